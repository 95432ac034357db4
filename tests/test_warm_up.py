"""Kernels that are compiled ahead are those that a run launches, each in one variant."""

import dataclasses
from collections import Counter

import pytest
import torch
from test_fast_models import forward, our_kernel, set_everywhere

from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.triton import int8 as triton_int8
from skyrun.kernels.triton.warm_up import Blocks, launches
from skyrun.models.dit.sparse import Learned
from skyrun.models.dit_header import block_layouts, read_dims
from skyrun.models.vae import WanVAE, read_vae_dims, vae_channels

if not torch.cuda.is_available():
    from triton.runtime.interpreter import InterpretedFunction

__all__ = ["forward"]  # a fixture
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.usefixtures("inference"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU"),
]


def variant(kernel, arguments, keywords):
    """What makes a kernel of its own: its name, the types of its arguments, and the values of its constants."""
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    parts = []
    for name, value in sorted(values.items()):
        if isinstance(value, torch.Tensor):
            parts.append((name, str(value.dtype)))
        elif name.isupper() and name not in ("M", "N", "L") or value is None:
            parts.append((name, value))
    return kernel.fn.__name__, tuple(parts)


@pytest.fixture
def launched(monkeypatch):
    """Variants that are launched, each with how often; nothing is computed."""
    found = Counter()

    def run(self, *arguments, grid, warmup, **keywords):
        found[variant(self, arguments, keywords)] += 1

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return found


@pytest.mark.parametrize(
    ("quant", "fast", "attention"),
    [
        ("Q4_K", False, "exact"),
        ("Q6_K", False, "fp8"),
        ("Q8_0", False, "full-int8"),
        ("Q4_K", True, "int8"),
        ("Q4_K", True, "exact"),
    ],
)
def test_a_run_launches_what_was_compiled_ahead(forward, converted, launched, monkeypatch, quant, fast, attention):
    file = open_gguf(next(converted(quant).glob("SkyReels*.gguf")))
    dims = read_dims(file)
    matrices = [info for block in block_layouts(file) for _, info, _ in block.tensors if len(info.shape) == 2]
    weights = frozenset((i.format.name, i.shape[1]) for i in matrices if i.format.block_size > 1)
    ahead = set()
    for work in launches(Blocks(weights, dims.dim, dims.ffn_dim, torch.float32, fast, attention), CPU):
        work()
        assert ahead.isdisjoint(launched)
        ahead |= set(launched)
        launched.clear()
    set_everywhere(monkeypatch, "uses_triton", lambda device: True)
    set_everywhere(monkeypatch, "fastest", our_kernel)
    monkeypatch.setattr(triton_int8, "_FEW", 0)  # the few tokens here are computed in tiles for many
    forward(quant, fast=fast, attention=attention)
    assert set(launched) == ahead


@pytest.mark.parametrize("attention", ["exact", "int8", "full-int8", "fp8"])
def test_attention_to_chosen_tiles_launches_what_was_compiled_ahead(
    forward, converted, launched, monkeypatch, attention
):
    file = open_gguf(next(converted("Q8_0").glob("SkyReels*.gguf")))
    dims = read_dims(file)
    dense = Blocks(frozenset(), dims.dim, dims.ffn_dim, torch.float32, False, attention)
    for work in launches(dense, CPU):
        work()
    others = set(launched)
    for work in launches(dataclasses.replace(dense, sparse_tokens=36), CPU):
        work()
    ahead = set(launched) - others
    assert len(ahead) == 5 and all(launched[one] == 1 for one in ahead)
    launched.clear()
    set_everywhere(monkeypatch, "uses_triton", lambda device: True)
    set_everywhere(monkeypatch, "fastest", our_kernel)
    levels = torch.full((1, dims.layers, dims.heads), 5, dtype=torch.int8)
    for known in (Learned(), Learned(levels)):
        forward("Q8_0", attention=attention, sparse=known)
    names = {name for name, _ in ahead}
    assert {one for one in launched if one[0] in names} - others == ahead


def test_an_autoencoder_launches_what_was_compiled_ahead(converted, launched, monkeypatch):
    path = next(converted("F32").glob("*.safetensors"))
    frames = frozenset((channels, torch.float32) for channels in vae_channels(read_vae_dims(path)[0]))
    blocks = Blocks(frozenset(), 256, 256, torch.float32, False, "exact")
    for work in launches(blocks, CPU):
        work()
    others = set(launched)
    for work in launches(dataclasses.replace(blocks, frames=frames), CPU):
        work()
    ahead = set(launched) - others
    assert len(ahead) == 4
    launched.clear()
    set_everywhere(monkeypatch, "uses_triton", lambda device: True)
    vae = WanVAE(path, CPU)
    for _ in vae.decode(torch.zeros(16, 2, 4, 6)):
        pass
    vae.encode(torch.zeros(3, 5, 32, 48))
    assert set(launched) == ahead
