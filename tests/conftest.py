"""Shared fixtures: reference data, the tiny checkpoint, and its conversions."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import pytest

# The models of the tests are so small that threads, here and in processes started from here, only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # tests have a hub of their own

if find_spec("skyrun") is None:  # a checkout that is not installed; the bare names kernels, quant, ... stay private
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import skyrun  # noqa: F401

    del sys.path[0]

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor
from without_triton import files_that_need_triton

# Started in the background by a shell, a process ignores interrupts; tests are about what they do.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():  # before any kernel is made: they run in Triton's interpreter, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default of old versions; some warn where it is not said

if find_spec("triton") is None:
    collect_ignore = files_that_need_triton()

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Golden:
    """A reference file: tensors and what the json beside it says."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]
    folder: Path

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.fixture(scope="session")
def goldens() -> Callable[[str], Golden]:
    """goldens("umt5/prompts") loads one reference file."""

    def load(name: str) -> Golden:
        path = DATA / "goldens" / name
        notes = path.with_name(f"{path.name}.json")
        return Golden(
            load_file(path.with_name(f"{path.name}.safetensors")),
            json.loads(notes.read_text()) if notes.is_file() else {},
            path.parent,
        )

    return load


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is measured and kept in tests is not the user's."""
    os.environ["SKYRUN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["SKYRUN_MODELS"] = str(tmp_path_factory.mktemp("models"))
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return DATA / "checkpoints" / "r2v-tiny"


@pytest.fixture(scope="session")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """converted("Q4_K", "v2v") is a folder with the files of a tiny checkpoint, made by the command line.

    Processes that run tests at the same time share it.
    """
    from skyrun.cli import main

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "converted"
    shared.mkdir(exist_ok=True)

    @cache
    def convert(quant: str, model: str = "r2v") -> Path:
        folder = shared / f"{model}-{quant}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                source, unfinished = checkpoint.with_name(f"{model}-tiny"), shared / f"{folder.name}.unfinished"
                assert main(["convert", str(source), "-o", str(unfinished), "--quant", quant]) == 0
                unfinished.rename(folder)
        return folder

    return convert


@pytest.fixture
def inference() -> Iterator[None]:
    """For tests that call models directly, which pipelines do in this mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """write_gguf(path, tensors, metadata, types) writes tensors in the order given, F32 where `types` names no type.

    uint8 tensors are blocks [rows, row_bytes] already.
    """
    import gguf

    def write(
        path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], types: dict[str, str] | None = None
    ) -> Path:
        from skyrun.quant import quantize

        writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "wan"))
        for key, value in metadata.items():
            add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            if key != "general.architecture":
                add.get(type(value), writer.add_array)(key, value)
        for name, tensor in tensors.items():
            kind = (types or {}).get(name, "F32")
            encoded = tensor.dtype == torch.uint8
            blocks = tensor if encoded else quantize(tensor.float().reshape(-1, tensor.shape[-1]), kind)
            data = blocks.view(*tensor.shape[:-1], -1) if tensor.dim() > 1 else blocks.view(-1)
            writer.add_tensor(name, data.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return path

    return write


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Iterator[Any]:
    """A hub with the tiny checkpoints under their published names, and nothing fetched from it yet."""
    from hub_server import serving
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from skyrun.tasks.sources import SOURCES

    with serving() as hub:
        for task, folder in (("r2v", "r2v-tiny"), ("v2v", "v2v-tiny"), ("a2v", "a2v-tiny")):
            hub.repos[SOURCES[task].checkpoint] = checkpoint.parent / folder
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        monkeypatch.setattr("skyrun.hub.client._WAIT", 0.01)
        monkeypatch.setenv("SKYRUN_MODELS", str(tmp_path / "models"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
        close_session()


@pytest.fixture
def run_command(tmp_path: Path) -> list[str]:
    """The command that makes a small clip, without a model."""
    from PIL import Image

    Image.new("RGB", (48, 32), "teal").save(tmp_path / "picture.png")
    small = ["--size", "32x48", "--frames", "5", "--steps", "2", "--device", "cpu", "-o", str(tmp_path / "clip.mp4")]
    return ["run", "r2v", "-p", "a sea", "--image", str(tmp_path / "picture.png"), *small]


@pytest.fixture(scope="session")
def published_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The header of the published autoencoder, before a hole in place of its weights."""
    from skyrun.kernels.name_tables import WAN_VAE

    shapes = WAN_VAE.shapes("original", {"base": 96, "z": 16})
    ends = list(accumulate(2 * prod(shape) for shape in shapes.values()))
    places = zip(shapes.items(), zip([0, *ends], ends, strict=False), strict=True)
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": place} for (name, shape), place in places}
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("published") / "vae.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + ends[-1])
    return path
