"""Every kind of file and reply that comes from outside: valid samples, made small here, and what reads them."""

import json
import os
import shutil
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import fuzz_media
import fuzz_readers
import numpy as np
import torch
from fuzz_readers import PROMPT
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import get_session
from huggingface_hub.utils._http import default_client_factory
from mutations import Mutation, either, json_file, json_text, mutated, mutated_value, safetensors_file, torch_file
from PIL import Image
from safetensors.torch import load_file

import skyrun.kernels.machine.choice as choice
from skyrun.cli.batch import read_prompts
from skyrun.engine.checkpoint import Origin, save_state
from skyrun.engine.output import state_path
from skyrun.engine.resume import resume
from skyrun.engine.window_files import WindowStore
from skyrun.events import drain
from skyrun.hub.client import list_repository
from skyrun.hub.gguf_repo import look
from skyrun.hub.manifest import Manifest
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.media.image import open_image
from skyrun.models.folder import open_folder
from skyrun.models.identity import model_identity
from skyrun.models.umt5 import UMT5
from skyrun.pipelines.embedding_cache import CachedEmbedding
from skyrun.pipelines.samplers import new_sampler
from skyrun.pipelines.state import RunState
from skyrun.planning.config import config_path, read_config
from skyrun.planning.hardware import Tuned, load_tuned, save_tuned, tuned_path
from skyrun.planning.model import choose_model
from skyrun.planning.request import Request
from skyrun.presets.machine.cards import Rates
from skyrun.quant.choose.importance import Importance, read_importance, write_importance
from skyrun.quant.conversion import write_file
from skyrun.quant.partial import finished_before, partial_path
from skyrun.quant.plan import Settings
from skyrun.quant.planner import plan_conversion
from skyrun.quant.sources.checkpoint import Part
from skyrun.quant.sources.tokenizer import tokenizer_keys
from skyrun.tasks import TASKS
from skyrun.tools.convert import plan, write
from skyrun.tools.tiny_checkpoint import CheckpointDims, write_checkpoint

COMMIT, BLOB, REPO = "0123456789abcdef" * 2 + "01234567", "0" * 40, "somebody/model"
_AVATAR = Path(__file__).parent.parent / "tests" / "data" / "checkpoints" / "a2v-tiny"
_CPU = torch.device("cpu")
_SMALL = CheckpointDims(dim=128, layers=1, ffn=256, text=64, text_layers=1, vae_base=2, shard_bytes=1 << 18)


@dataclass(frozen=True)
class Sample:
    """A valid file. path: where its damaged copies are put, beside what belongs to it."""

    path: Path
    data: bytes
    damage: Mutation = mutated


@dataclass(frozen=True)
class Kind:
    """Samples of one kind, and what reads their damaged copies. share: how often, beside other kinds."""

    samples: list[Sample]
    use: Callable[[Path], object]
    share: int


class Samples:
    """Makes the samples of all kinds in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._hub = folder, folder
        self._checkpoint, self._model = folder / "checkpoint", folder / "model"
        write_checkpoint(self._checkpoint, _SMALL)
        self._avatar = folder / "avatar"
        for source, out in ((self._checkpoint, self._model), (_AVATAR, self._avatar)):
            drain(write(drain(plan(source, out, Settings("Q8_0")))))
        self._picture = folder / "picture.png"
        Image.new("RGB", (48, 32)).save(self._picture)
        self._encoder = UMT5(open_gguf(next(self._model.glob("umt5*"))))

    def kinds(self) -> dict[str, Kind]:
        """Every kind by its name."""
        return {
            "gguf": Kind(self._of_model("*.gguf", "clip*"), fuzz_readers.run_model, 8),
            "gguf-convert": Kind(self._of(self._model, "*.gguf"), fuzz_readers.convert, 4),
            "safetensors": Kind(
                self._of_model("*.safetensors", "wav2vec2*", safetensors_file), fuzz_readers.run_model, 6
            ),
            "safetensors-convert": Kind(
                self._checkpoint_file("text_encoder/*.safetensors", safetensors_file), fuzz_readers.convert, 3
            ),
            "pth": Kind(self._pth(), fuzz_readers.convert, 8),
            "imatrix": Kind(self._importance(), read_importance, 12),
            "spiece": Kind(self._tokenizer("spiece.model"), self._read_tokenizer, 10),
            "tokenizer": Kind(self._tokenizer("tokenizer.json"), self._read_tokenizer, 5),
            "index": Kind(self._checkpoint_file("transformer/*.index.json", json_file), fuzz_readers.convert, 3),
            "request": Kind(self._request(), fuzz_readers.request, 24),
            "tag": Kind(self._tag(), fuzz_readers.tag, 10),
            "video": Kind(self._media(fuzz_media.videos), fuzz_readers.video, 4),
            "audio": Kind(self._media(fuzz_media.recordings), fuzz_readers.audio, 6),
            "image": Kind(self._images(), open_image, 16),
            "hub": Kind(self._replies(), self._list, 12),
            "manifest": Kind(self._manifest(), fuzz_readers.manifest, 16),
            "tune": Kind(self._tune(), lambda path: load_tuned("cpu"), 16),
            "choices": Kind(self._choices(), fuzz_readers.choices, 16),
            "embeddings": Kind(self._embeddings(), self._embedding, 10),
            "state": Kind(self._state(), resume, 10),
            "window": Kind(self._window(), self._read_window, 6),
            "journal": Kind(self._journal(), lambda path: finished_before(self._begun), 8),
            "config": Kind(self._config(), lambda path: read_config(), 8),
            "prompts": Kind([Sample(self._folder / "prompts.txt", f"a sea\n{PROMPT}\n".encode())], read_prompts, 8),
        }

    def _beside(self, source: Path, path: Path, damage: Mutation) -> Sample:
        """A sample for one file of a folder; the copy of that folder is its own, the other files are links."""
        folder = self._folder / "of" / f"{len(list((self._folder / 'of').glob('*')))}"
        shutil.copytree(source, folder, copy_function=os.link)
        (folder / path).unlink()
        return Sample(folder / path, (source / path).read_bytes(), damage)

    def _of(self, source: Path, pattern: str, *damages: Mutation) -> list[Sample]:
        paths = sorted(path.relative_to(source) for path in source.glob(pattern))
        assert paths, pattern
        return [self._beside(source, path, either(mutated, *damages)) for path in paths]

    def _of_model(self, pattern: str, encoder: str, *damages: Mutation) -> list[Sample]:
        """Files of a model, and one of the encoders that only an avatar has."""
        return [*self._of(self._model, pattern, *damages), *self._of(self._avatar, encoder, *damages)]

    def _checkpoint_file(self, pattern: str, *damages: Mutation) -> list[Sample]:
        return self._of(self._checkpoint, pattern, *damages)

    def _pth(self) -> list[Sample]:
        """The text encoder and the autoencoder as torch.save writes them."""
        source = self._folder / "pth"
        source.mkdir()
        shutil.copy(self._checkpoint / "tokenizer/tokenizer.json", source)
        for part in ("text_encoder", "vae"):
            (weights,) = (self._checkpoint / part).glob("*.safetensors")
            state = OrderedDict(load_file(weights))
            torch.save(state if part == "vae" else {"epoch": 3, "state_dict": state}, source / f"{part}.pth")
        return self._of(source, "*.pth", torch_file)

    def _importance(self) -> list[Sample]:
        sums = {f"blocks.{block}.ffn.0.weight": torch.rand(64, dtype=torch.float64) for block in range(3)}
        importance = Importance(sums, dict.fromkeys(sums, 100), "a model", ("a sea", "a lake"), 2)
        paths = [self._folder / f"importance{suffix}" for suffix in (".gguf", ".dat")]
        for path in paths:
            write_importance(path, importance)
        return [Sample(path, path.read_bytes()) for path in paths]

    def _tokenizer(self, name: str) -> list[Sample]:
        """tokenizer.json as it is, spiece.model as SentencePiece writes it: messages of pieces, trainer, normaliser."""
        path = self._folder / name.partition(".")[0] / name
        path.parent.mkdir()
        if name == "tokenizer.json":
            data = (self._checkpoint / "tokenizer/tokenizer.json").read_bytes()
            return [Sample(path, data, either(mutated, json_file))]
        special = [("<pad>", 3), ("</s>", 3), ("<unk>", 2), ("\u2581", 1)]
        pieces = [_piece(text, -float(place), type) for place, (text, type) in enumerate(special)]
        pieces += [_piece(letter, -9.0, 1) for letter in "abcdefghijklmnop猫"]
        return [Sample(path, b"".join(pieces) + b"\x12\x02\x18\x01\x1a\x06\x18\x01\x20\x01\x28\x01")]

    def _read_tokenizer(self, path: Path) -> None:
        part = Part("the encoder", (path,), {}, {}, "")
        tokenizer_keys(path.parent, part, 512)

    def _request(self) -> list[Sample]:
        image = self._picture
        requests = [
            Request("r2v", PROMPT, images=(image,), size=(480, 832), frames=25, seed=3, prefer="speed", max_vram=6.5),
            Request("v2v", PROMPT, video=image, seconds=5, join=True, output=self._folder / "clip.mp4"),
            Request("shot", PROMPT, video=image, transition="cut-in", steps=8, quant="Q4_K_M"),
            Request("a2v", PROMPT, images=(image,), audio=image, seconds=7, device="cuda:1", dtype="bfloat16"),
        ]
        path = self._folder / "request.json"
        return [Sample(path, json.dumps(request.as_json()).encode(), json_file) for request in requests]

    def _tag(self) -> list[Sample]:
        comment = Request("r2v", "a sea " * 300, images=(self._picture,), seed=3, size=(480, 832)).as_json()
        path = fuzz_media.clip(self._folder / "clip.mp4", comment)
        start, length = path.read_bytes().index(b'{"task"'), len(json.dumps(comment))

        def in_comment(data: bytes, random: Random) -> bytes:
            text = random.choice((json_text(comment, random), mutated(data[start : start + length], random)))
            return data[:start] + text[:length].ljust(length) + data[start + length :]

        return [Sample(path, path.read_bytes(), either(mutated, in_comment, in_comment))]

    def _media(self, write: Callable[[Path], list[Path]]) -> list[Sample]:
        return [Sample(path, path.read_bytes()) for path in write(self._folder)]

    def _images(self) -> list[Sample]:
        return [Sample(self._folder / "image", data) for data in fuzz_media.images()]

    def _replies(self) -> list[Sample]:
        """What a hub says of a repository of GGUF files, and the beginnings of these."""
        source = self._folder / "hub"
        source.mkdir()
        (transformer,) = self._model.glob("SkyReels*.gguf")
        lfs = {"oid": "1" * 64, "size": 4096}
        listed = [
            {"type": "file", "path": name, "oid": BLOB, "size": 1 << 20, "lfs": lfs}
            for name in ("a/R2V-Q4_K.gguf", "b-Q8_0.gguf", "vae.safetensors")
        ]
        (source / "model").write_text(json.dumps({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": "a.gguf"}]}))
        (source / "tree").write_text(json.dumps([*listed, {"type": "directory", "path": "a", "oid": BLOB, "size": 0}]))
        (source / "link").write_text(f'<https://huggingface.co/api/models/{REPO}/tree/{COMMIT}?cursor=1>; rel="next"')
        (source / "start").write_bytes(transformer.read_bytes()[: 1 << 15])
        client = import_module(type(get_session()).__module__.partition(".")[0])  # the HTTP library differs
        set_client_factory(
            lambda: client.Client(transport=client.MockTransport(lambda asked: self._answer(client, asked)))
        )
        whole = self._of(source, "[mt]*", json_file)
        return [*whole, *self._of(source, "[ls]*")]

    def _answer(self, client: Any, asked: Any) -> Any:
        path, headers = asked.url.path, []
        if "/tree/" in path:
            more = (self._hub / "link").read_bytes() if "cursor" not in str(asked.url) else b""
            headers = [(b"link", more)]
            content = (self._hub / "tree").read_bytes() if more else b"[]"
        else:
            content = (self._hub / ("model" if "/api/" in path else "start")).read_bytes()
        return client.Response(200, headers=headers, content=content)

    def _list(self, path: Path) -> None:
        self._hub = path.parent
        look(list_repository(REPO))

    def _manifest(self) -> list[Sample]:
        folder = self._folder / "fetched" / "r2v-Q8_0"
        Manifest("r2v", "Q8_0", {REPO: COMMIT}, {f"{REPO}/a/b.gguf": ["b.gguf"]}, ["c.gguf"], True, "r2v").write(
            _made(folder)
        )
        path = folder / "skyrun-model.json"
        return [Sample(path, path.read_bytes(), either(mutated, json_file, json_file))]

    def _tune(self) -> list[Sample]:
        save_tuned("cpu", Tuned(Rates(1e12, 1e12, 0.0, 0.0, 1e11, 1e10), 0.0, {"2049": 1e9}))
        return [_sealed(tuned_path("cpu"))]

    def _choices(self) -> list[Sample]:
        choice.seconds(_CPU, "matmul 4096", {"a": lambda: None, "b": lambda: 1 / 0})
        (path,) = (self._folder / "cache").glob("kernels-*.json")
        return [_sealed(path)]

    def _embeddings(self) -> list[Sample]:
        self._cached().store(torch.rand(4, self._encoder.dim))
        (path,) = (self._folder / "cache" / "prompts").glob("*.safetensors")
        return [Sample(path, path.read_bytes(), either(mutated, safetensors_file))]

    def _cached(self) -> CachedEmbedding:
        return CachedEmbedding(self._encoder.file, [5, 6, 7, 1], self._encoder.dim, _CPU)

    def _embedding(self, path: Path) -> None:
        self._cached().load()

    def _state(self) -> list[Sample]:
        places = {"images": (self._picture,), "output": self._folder / "c.mp4", "model": self._model}
        request = Request("r2v", "a sea", size=(32, 48), frames=5, steps=4, seed=1, device="cpu", **places)
        sampler, latents = new_sampler(TASKS["r2v"], 4), torch.rand(16, 2, 4, 6)
        state = RunState({name: torch.rand(2, 8) for name in TASKS["r2v"].encoded})
        state.finish_step(sampler.step(torch.rand(16, 2, 4, 6), latents), sampler, state.learned)
        path, files = state_path(request.output), choose_model(open_folder(self._model), TASKS["r2v"]).files
        save_state(path, state, Origin(request, model_identity(files), "cpu", "float32", "exact", "exact"))
        return [Sample(path, path.read_bytes(), either(mutated, safetensors_file, _resealed, _resealed))]

    def _window(self) -> list[Sample]:
        """Frames and latents of a window, each beside the other."""
        source = _made(self._folder / "window")
        store = WindowStore(source / "c.skyrun", 32, 48)
        store.begin(0)
        store.add(np.zeros((5, 32, 48, 3), np.uint8))
        store.finish(torch.rand(16, 2, 4, 6))
        return [*self._of(source, "*.mkv"), *self._of(source, "*.safetensors", safetensors_file)]

    def _read_window(self, path: Path) -> None:
        frames, _ = WindowStore(path.with_name("c.skyrun"), 32, 48).read(0, 5)
        for _ in frames:
            pass

    def _journal(self) -> list[Sample]:
        """What an interrupted conversion says that it has finished."""
        self._begun = plan_conversion(self._checkpoint, self._folder / "begun", Settings("Q8_0")).files[0]
        writing = write_file(self._begun)
        for _ in range(4):
            next(writing)
        writing.close()
        path = partial_path(self._begun.path)
        journal = path.with_name(f"{path.name}.journal")
        return [Sample(journal, journal.read_bytes())]

    def _config(self) -> list[Sample]:
        _made(config_path().parent)
        text = 'models = "/mnt/big/models"\nresolution = "480P"\nquant = "Q6_K"\nprefer = "speed"\n'
        return [Sample(config_path(), text.encode())]


@contextmanager
def kinds_in(folder: Path) -> Iterator[dict[str, Kind]]:
    """Every kind by its name, in a folder. Meanwhile the caches and the hub are the folder's."""
    places = {"SKYRUN_CACHE": "cache", "SKYRUN_MODELS": "fetched", "XDG_CONFIG_HOME": "config"}
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {name: str(folder / place) for name, place in places.items()}))
        stack.enter_context(patch.object(constants, "HF_HUB_OFFLINE", False))
        stack.callback(set_client_factory, default_client_factory)
        yield Samples(folder).kinds()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _piece(text: str, score: float, type: int) -> bytes:
    """A piece of a SentencePiece model, as a field of a protocol buffer."""
    name = text.encode()
    message = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([type])
    return b"\x0a" + bytes([len(message)]) + message


def _sealed(path: Path) -> Sample:
    """A file of measurements; half of its damaged copies have the checksum of what is in them."""

    def sealed(data: bytes, random: Random) -> bytes:
        values = json.loads(data)
        outside = {name: values.pop(name) for name in ("holds_for", "checksum")}
        values = mutated_value(values, random)
        if isinstance(values, dict):
            outside["checksum"] = sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
            values = outside | values
        return json.dumps(values).encode()

    return Sample(path, path.read_bytes(), either(mutated, json_file, sealed, sealed))


def _resealed(data: bytes, random: Random) -> bytes:
    """The state of a run with another description, tensors that are called otherwise, and the checksum of them."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    said = header.pop("__metadata__")
    said["run"] = json_text(json.loads(said["run"]), random).decode("utf-8", "replace")
    if random.random() < 0.3 and len(header) > 1:
        name = random.choice(list(header))
        header[random.choice((f"{name}x", "latents", "sampler.x", "carried.y"))] = header.pop(name)
    checksum = zlib.crc32(said["run"].encode())
    for name in sorted(header):
        first, last = header[name]["data_offsets"]
        checksum = zlib.crc32(data[start + first : start + last], zlib.crc32(name.encode(), checksum))
    text = json.dumps({"__metadata__": said | {"crc32": f"{checksum:08x}"}} | header).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]
