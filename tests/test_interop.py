"""Converted transformers in other tools: gguf-py reads the same numbers, diffusers computes the same velocity.

Formats are those that ComfyUI-GGUF, stable-diffusion.cpp and diffusers agree on; the rules test names the reader that
stumbles over each.
"""

import json
import os
import re
import socket
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from skyrun.events import drain
from skyrun.kernels import dequantize
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.models.dit import Context, DiT
from skyrun.models.dit_header import block_layouts
from skyrun.quant import convert
from skyrun.quant.choose.importance import original_name
from skyrun.streaming.stream import BlockStream
from skyrun.tools.calibrate import SumsOfSquares

DATA = Path(__file__).parent / "data"
TASKS = ["r2v", "v2v", "shot", "a2v"]
IN_DIFFUSERS = ["r2v", "v2v"]  # which knows no audio; the tiny shot transformer has one block, a config of its own
# Largest relative difference between diffusers' velocity and ours. F32 and BF16: the order of float32 sums. Others:
# diffusers decodes blocks in float16, which rounds every weight by up to 2^-11, and a K type's scales and minima before
# it. Measured: 1.4e-4 for Q8_0, 7.7e-4 for Q4_K; the errors of the types themselves are 3.4e-3 and 4.7e-2.
TOLERANCES = {"F32": 1e-5, "BF16": 1e-5, "Q8_0": 3e-4, "Q6_K": 1e-3, "Q4_K": 1e-3, "Q4_K_M": 1e-3, "Q2_K": 1e-3}
# The types that matrices of blocks may have in a file of each type, with llama.cpp's for rows that do not fit.
ALLOWED = {quant: {quant} for quant in TOLERANCES} | {"Q6_K": {"Q6_K", "Q8_0"}, "Q4_K": {"Q4_K", "Q5_0"}}
ALLOWED |= {"Q4_K_M": {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}, "Q2_K": {"Q2_K", "Q3_K", "IQ4_NL"}}
PLAIN = {"F32", "F16", "BF16"}
CASES = [(task, quant) for task in TASKS for quant in TOLERANCES]
DIFFUSERS_CASES = [(task, quant) for task in IN_DIFFUSERS for quant in TOLERANCES]
CPU = torch.device("cpu")

needs_diffusers = pytest.mark.skipif(
    not (find_spec("diffusers") and find_spec("accelerate")), reason="diffusers or accelerate is not installed"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """files("v2v", "Q8_0") is a transformer of that task, converted from its published layout."""
    made = {}

    def make(task, quant):
        repository = {"shot": "v2v"}.get(task, task)
        if (task, quant) not in made:
            folder = tmp_path_factory.mktemp(f"{repository}-{quant}")
            convert(DATA / "checkpoints" / f"{repository}-tiny", folder, quant)
            for path in folder.glob("SkyReels*.gguf"):
                made[open_gguf(path).metadata["skyrun.task"], quant] = path
        return made[task, quant]

    return make


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A folder with what diffusers has to know of the architecture; both tiny models have the same."""
    folder = tmp_path_factory.mktemp("config")
    text = (DATA / "checkpoints" / "r2v-tiny" / "transformer" / "config.json").read_text()
    values = json.loads(text) | {"_class_name": "WanTransformer3DModel"}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def offline(monkeypatch):
    """No look at a hub, and no way to one."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")

    def refuse(*_):
        raise AssertionError("something wants to connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def in_diffusers(path, config):
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    return WanTransformer3DModel.from_single_file(
        str(path),
        config=str(config),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def inputs():
    """Latents [C, F, h, w], a timestep, and a text of nine tokens."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, 6, 4, 6, generator=generator), 937, torch.randn(9, 128, generator=generator)


def forward(path, inputs, observe=None):
    latents, time, text = inputs
    file = open_gguf(path)
    dit = DiT(file, CPU, torch.float32)
    with torch.inference_mode(), BlockStream(path, block_layouts(file), CPU, observe=observe) as stream:
        (embedding,) = dit.embed_times([time])
        return drain(
            dit.forward(
                stream, latents, [embedding] * latents.shape[1], Context(dit.embed_text(text)), dit.rope(latents)
            )
        )


def forward_in_diffusers(model, inputs):
    latents, time, text = inputs
    padded = torch.cat((text, torch.zeros(512 - len(text), text.shape[1])))
    with torch.inference_mode():
        return model(latents[None], torch.tensor([time]), padded[None], return_dict=False)[0][0]


@pytest.mark.parametrize(("task", "quant"), CASES)
def test_gguf_py_reads_the_same_numbers(files, task, quant):
    path = files(task, quant)
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        data = torch.frombuffer(ours.read(info), dtype=torch.uint8)
        numbers = dequantize(data.view(-1, info.format.row_bytes(info.shape[-1])), info.format.name).numpy()
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(numbers.reshape(info.shape), expected.reshape(info.shape)), tensor.name


@needs_diffusers
@pytest.mark.parametrize(("task", "quant"), DIFFUSERS_CASES)
def test_diffusers_computes_the_same_velocity(files, config, inputs, offline, task, quant):
    expected = forward_in_diffusers(in_diffusers(files(task, quant), config), inputs)
    velocity = forward(files(task, quant), inputs)
    difference = float((velocity - expected).norm() / expected.norm())
    assert difference < TOLERANCES[quant]
    if quant not in PLAIN:  # the tolerance tells one type from another
        assert float((forward(files(task, "F32"), inputs) - expected).norm() / expected.norm()) > TOLERANCES[quant]


@needs_diffusers
@pytest.mark.parametrize("task", IN_DIFFUSERS)
def test_importance_is_what_the_layers_of_diffusers_see(files, config, inputs, offline, task):
    model, seen = in_diffusers(files(task, "F32"), config), {}

    def note(name):
        return lambda _, args: seen.update({name: args[0].double().flatten(0, -2)})

    for name, module in model.named_modules():
        if name.startswith("blocks.") and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(note(original_name(f"{name}.weight")))
    forward_in_diffusers(model, inputs)
    squares = SumsOfSquares()
    forward(files(task, "F32"), inputs, squares)
    assert squares.counts == {name: len(x) for name, x in seen.items()}
    for name, sums in squares.sums().items():
        # Diffusers has the waves of time in float32, which shows in the fifth digit.
        torch.testing.assert_close(sums, seen[name].square().sum(0), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("task", "quant"), CASES)
def test_a_transformer_keeps_the_rules_of_all_readers(files, task, quant):
    path = files(task, quant)
    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    # ComfyUI-GGUF looks at the architecture; stable-diffusion.cpp misreads arrays in a file with five axes.
    assert fields["general.architecture"].contents() == "wan"
    assert fields["general.quantization_version"].contents() == 2
    assert isinstance(fields["general.file_type"].contents(), int)
    assert not [name for name, field in fields.items() if gguf.GGUFValueType.ARRAY in field.types]
    assert "general.alignment" not in fields
    assert reader.alignment == 32
    shapes = {info.name: info.shape for info in open_gguf(path).tensors.values()}
    for tensor in reader.tensors:
        name, type, shape = tensor.name, tensor.tensor_type.name, tuple(int(n) for n in tensor.shape[::-1])
        assert shape == shapes[name]
        assert len(name.encode()) <= 127  # ggml's longest
        assert re.match(
            r"(blocks\.\d+|head|(patch|text|time)_embedding|time_projection|img_emb|audio_proj)\.", name
        )  # no prefix
        assert original_name(name) == name
        assert tensor.data_offset % 32 == 0
        if name.endswith("modulation"):  # a parameter: read as it lies
            assert (type, len(shape)) == ("F32", 3)
        elif name == "patch_embedding.weight":  # a convolution in three dimensions: neither decoded nor reshaped
            assert (type, shape) == ("F32", (256, 36 if task == "a2v" else 16, 1, 2, 2))
        elif len(shape) == 1:
            assert type == "F32"
        else:
            assert len(shape) == 2
            assert name.endswith(".weight")
            assert type in (ALLOWED[quant] if name.startswith("blocks.") else PLAIN)
    assert not [name for name in shapes if name.endswith(".bias") and len(shapes[name]) != 1]
