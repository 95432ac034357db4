"""The transformer with its layers in int8, and through Triton's kernels, beside the exact one."""

import sys

import pytest
import torch

from skyrun.events import drain
from skyrun.kernels import linear
from skyrun.kernels.elementwise import add_gated
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.quantized_keys import PRECISIONS
from skyrun.kernels.tiles import USUAL
from skyrun.kernels.torch import int8 as torch_int8
from skyrun.kernels.triton import encode as triton_encode
from skyrun.models.dit import Context, DiT
from skyrun.models.dit.sparse import SelfCheck
from skyrun.models.dit.tile_order import Frames, tile_order
from skyrun.models.dit_header import block_layouts
from skyrun.streaming import weights as weights_module
from skyrun.streaming.stream import BlockStream

CPU = torch.device("cpu")
LINEAR_BOUND = 0.016  # relative error that int8 may add to a linear layer, see test_accuracy.py
pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def forward(goldens, converted):
    """forward("Q4_K", fast) is the tiny model's velocity for the golden's latents. text_rows: of the text, or all."""
    golden = goldens("dit_r2v/t6_4x6")

    def run(quant, fast=False, text_rows=None, attention="exact", sparse=None):
        file = open_gguf(next(converted(quant).glob("SkyReels*.gguf")))
        dit = DiT(file, CPU, torch.float32)
        (time,) = dit.embed_times(golden["in.timesteps"].tolist()[:1])
        latents = golden["in.hidden_states"][0]
        context, rope = Context(dit.embed_text(golden["in.context_valid"])[:text_rows]), dit.rope(latents)
        with BlockStream(file.path, block_layouts(file), CPU, fast=fast, attention=attention) as stream:
            times = [time] * latents.shape[1]
            if sparse is None:
                return drain(dit.forward(stream, latents, times, context, rope))
            order = tile_order([Frames(1, True), Frames(latents.shape[1] - 1)], 2, 3, USUAL)
            check = SelfCheck(0.5, order, (1, dit.dims.layers, dit.dims.heads), sparse)
            return drain(dit.velocities(stream, latents, times, [context], rope, order, check))[0]

    return run


def moved(result, reference):
    return float((result - reference).norm() / reference.norm())


def with_noise(seed):
    """`linear` with the error of the bound on its products."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(x, weight, bias=None, *, gate=None, residual=None):
        product = linear(x, weight, bias)
        size = LINEAR_BOUND * product.square().mean().sqrt()
        product = product + size * torch.randn(product.shape, generator=generator)
        return product if residual is None else add_gated(residual, product, gate)

    return noisy


@pytest.mark.parametrize("quant", ["Q8_0", "Q6_K", "Q4_K", "Q2_K", "BF16"])
def test_int8_moves_the_result_no_more_than_the_bound_of_its_layers(forward, monkeypatch, quant):
    exact = forward(quant)
    movement = moved(forward(quant, fast=True), exact)
    predicted = []
    for seed in range(4):
        monkeypatch.setattr(weights_module, "linear", with_noise(seed))
        predicted.append(moved(forward(quant), exact))
    assert 1e-4 < movement < sum(predicted) / len(predicted)


def set_everywhere(patch, name, value):
    for module in [module for key, module in sys.modules.items() if key.startswith("skyrun.")]:
        if hasattr(module, name):
            patch.setattr(module, name, value)


def our_kernel(device, key, candidates):
    """Instead of measuring, which takes long in the interpreter."""
    return next((name for name in PRECISIONS if name in candidates), next(iter(candidates)))


@pytest.fixture
def triton_everywhere(monkeypatch):
    """As on a card that runs Triton: its kernels, here in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: kernels run on it, not in the interpreter")
    set_everywhere(monkeypatch, "uses_triton", lambda device: True)
    set_everywhere(monkeypatch, "fastest", our_kernel)


@pytest.mark.parametrize("quant", ["Q4_K", "Q6_K"])
def test_the_model_through_tritons_kernels(forward, triton_everywhere, monkeypatch, quant):
    with monkeypatch.context() as plain:
        set_everywhere(plain, "uses_triton", lambda device: False)
        expected = forward(quant, text_rows=9)
    assert moved(forward(quant, text_rows=9), expected) < 2e-5


def test_the_golden_through_tritons_kernels(goldens, forward, triton_everywhere):
    sample = forward("F32")
    assert float((sample - goldens("dit_r2v/t6_4x6")["out.sample0"][0]).abs().max()) < 2e-5


def test_the_fast_model_through_tritons_kernels(forward, triton_everywhere, monkeypatch):
    # A program for each row of a weight takes minutes in the interpreter; test_block_products.py has that kernel.
    monkeypatch.setattr(triton_encode, "encode_weight", torch_int8.encode_weight)
    with monkeypatch.context() as plain:
        set_everywhere(plain, "uses_triton", lambda device: False)
        exact = forward("Q4_K", text_rows=9)
        twin = forward("Q4_K", fast=True, text_rows=9, attention="int8")
    fast = forward("Q4_K", fast=True, text_rows=9, attention="int8")
    assert 1e-4 < moved(fast, exact) < 2 * moved(twin, exact)
