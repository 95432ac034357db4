"""Tokens pass through a block in parts: the result does not depend on how many at a time, or where they wait."""

import pytest
import torch

from skyrun.events import drain
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.quantized_keys import PRECISIONS
from skyrun.models.dit import Context, DiT
from skyrun.models.dit.spans import chunks
from skyrun.models.dit_header import block_layouts
from skyrun.streaming.stream import BlockStream, spread

CPU = torch.device("cpu")
TOKENS = 36  # of the golden
pytestmark = pytest.mark.usefixtures("inference")


def forward(file, golden, *, slots=3, resident=0, attention="exact", **how):
    dit = DiT(file, CPU, torch.float32, **how)
    (time,) = dit.embed_times(golden["in.timesteps"].tolist()[:1])
    latents = golden["in.hidden_states"][0]
    context, rope = Context(dit.embed_text(golden["in.context_valid"])), dit.rope(latents)
    kept = spread(resident, dit.dims.layers)
    with BlockStream(file.path, block_layouts(file), CPU, slots=slots, resident=kept, attention=attention) as stream:
        return drain(dit.forward(stream, latents, [time] * latents.shape[1], context, rope))


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 5, 7, 18, 35, 36, 1000])
def test_the_golden_holds_for_every_number_of_rows(goldens, converted, rows, parked):
    golden = goldens("dit_r2v/t6_4x6")
    file = open_gguf(next(converted("F32").glob("SkyReels*.gguf")))
    sample = forward(file, golden, rows=rows, parked=parked)
    assert float((sample - golden["out.sample0"][0]).abs().max()) < 2e-5


@pytest.mark.parametrize(("slots", "resident"), [(2, 0), (2, 1), (3, 2), (5, 0)])
def test_the_golden_holds_for_every_ring(goldens, converted, slots, resident):
    golden = goldens("dit_r2v/t6_4x6")
    file = open_gguf(next(converted("F32").glob("SkyReels*.gguf")))
    sample = forward(file, golden, rows=7, slots=slots, resident=resident)
    assert float((sample - golden["out.sample0"][0]).abs().max()) < 2e-5


@pytest.mark.parametrize("rows", [9, 36])
@pytest.mark.parametrize("attention", PRECISIONS)
def test_parked_tokens_are_the_same_tokens(goldens, converted, attention, rows):
    """Though values are computed twice where keys are quantized."""
    golden = goldens("dit_r2v/t6_4x6")
    file = open_gguf(next(converted("Q4_K").glob("SkyReels*.gguf")))
    held, parked = (forward(file, golden, rows=rows, parked=parked, attention=attention) for parked in (False, True))
    assert torch.equal(held, parked)


@pytest.mark.parametrize(("tokens", "rows"), [(0, None), (0, 4), (1, None), (36, 1), (36, 5), (36, 36), (36, 37)])
def test_parts_cover_every_token_once(tokens, rows):
    parts = chunks(0, tokens, rows)
    assert [n for part in parts for n in range(tokens)[part]] == list(range(tokens))
    assert all(part.stop - part.start <= (rows or tokens) for part in parts)
