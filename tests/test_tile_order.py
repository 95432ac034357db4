"""The order of tokens: every token once, neighbours together, and the same results as in any other order."""

import pytest
import torch

from skyrun.events import drain
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.tiles import SMALL, USUAL
from skyrun.models.dit import Context, DiT
from skyrun.models.dit.tile_order import Frames, tile_order
from skyrun.models.dit_header import block_layouts
from skyrun.pipelines.conditioning import Condition
from skyrun.streaming.stream import BlockStream

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("inference")
CLIP = [Frames(1, True), Frames(20), *[Frames(1, True)] * 4]


@pytest.mark.parametrize("tiles", [USUAL, SMALL])
@pytest.mark.parametrize(
    ("frames", "rows", "cols"),
    [([Frames(1)], 1, 1), ([Frames(5)], 3, 3), (CLIP, 30, 52), (CLIP, 7, 5), ([Frames(2, True), Frames(3)], 1, 9)],
)
def test_every_token_has_a_place(frames, rows, cols, tiles):
    order = tile_order(frames, rows, cols, tiles)
    count = sum(part.count for part in frames)
    assert torch.equal(order.index.sort().values, torch.arange(count * rows * cols))
    values = torch.randn(len(order.index), 3)
    assert torch.equal(order.restored(order.arranged(values)), values)
    first = 0
    for part in frames:  # parts do not mix
        places = slice(first * rows * cols, (first + part.count) * rows * cols)
        frame = order.index[places] // (rows * cols)
        assert frame.min() == first and frame.max() == first + part.count - 1
        assert ((places.start, places.stop) in order.always) == part.always
        first += part.count


@pytest.mark.parametrize(("frames", "rows", "cols"), [(20, 45, 80), (20, 30, 52), (1, 45, 80), (31, 34, 60)])
def test_a_tile_is_compact_wherever_it_begins(frames, rows, cols):
    """In frame, row, column order 64 keys of 720P are a strip, 64 long. At turns of the walk some are longer."""
    index = tile_order([Frames(frames)], rows, cols, USUAL).index
    for tile, deep, side in ((64, 4, 4), (128, 4, 8)):
        for begin in (0, 13):
            runs = index[begin:][: (len(index) - begin) // tile * tile].view(-1, tile)
            extents = [
                (place.amax(1) - place.amin(1) + 1).float()
                for place in (runs // (rows * cols), runs // cols % rows, runs % cols)
            ]
            spans = torch.stack(extents).mean(1)
            side = side if frames > 1 else 2 * side
            assert spans[0] <= min(frames, deep + 1) and max(spans[1:]) < 2 * side


def test_frames_of_a_range_are_found():
    order = tile_order([Frames(1, True), Frames(4)], 3, 3, SMALL)
    for rows in (slice(0, 45), slice(7, 30)):
        found = torch.full((rows.stop - rows.start,), -1)
        for frame, places in order.by_frame(rows, CPU):
            found[places] = frame
        assert torch.equal(found, order.index[rows] // 9)


def ordered(dit, latents, condition, times):
    order = condition.order(dit, latents, [times])
    return order, condition.rope(dit, latents, order)


@pytest.mark.parametrize("rows", [None, 7])
def test_the_golden_holds_in_this_order(goldens, converted, rows):
    golden = goldens("dit_r2v/t6_4x6")
    file = open_gguf(next(converted("F32").glob("SkyReels*.gguf")))
    dit = DiT(file, CPU, torch.float32, rows=rows)
    (time,) = dit.embed_times(golden["in.timesteps"].tolist()[:1])
    latents = golden["in.hidden_states"][0]
    text = golden["in.context_valid"]
    order, rope = ordered(dit, latents[:, :2], Condition(text, after=latents[:, 2:]), [time] * 6)
    assert not torch.equal(order.index, torch.arange(36))
    with BlockStream(file.path, block_layouts(file), CPU) as stream:
        sample = drain(dit.forward(stream, latents, [time] * 6, Context(dit.embed_text(text)), rope, order))
    assert float((sample - golden["out.sample0"][0]).abs().max()) < 2e-5


@pytest.mark.parametrize("rows", [None, 7])
def test_frames_hear_their_own_audio_in_this_order(converted, rows):
    file = open_gguf(next(converted("F32", "a2v").glob("SkyReels-V3-A2V-*.gguf")))
    dit = DiT(file, CPU, torch.float32, rows=rows)
    context = Context(
        torch.randn(512, dit.dims.dim), torch.randn(9, dit.dims.dim), torch.randn(7, 3, dit.dims.audio_dim)
    )
    latents = torch.randn(dit.dims.in_channels, 7, 6, 10)
    (time,) = dit.embed_times([500])
    order, rope = ordered(dit, latents, Condition(context.text), [time] * 7)
    with BlockStream(file.path, block_layouts(file), CPU, passes=2) as stream:
        expected = drain(dit.forward(stream, latents, [time] * 7, context, dit.rope(latents)))
        sample = drain(dit.forward(stream, latents, [time] * 7, context, rope, order))
    assert float((sample - expected).abs().max()) < 2e-5


def test_frames_of_unlike_times_are_not_mixed(converted):
    file = open_gguf(next(converted("F32").glob("SkyReels*.gguf")))
    dit = DiT(file, CPU, torch.float32)
    early, late = dit.embed_times([0, 800])
    latents = torch.randn(16, 9, 8, 8)
    condition = Condition(torch.empty(0), before=torch.randn(16, 3, 8, 8), after=torch.randn(16, 2, 8, 8))
    times = [[early] * 8 + [late] * 6, [early] * 4 + [late] * 10]
    index = condition.order(dit, latents, times).index // 16
    edges = [0, 3, 4, 8, 12, 13, 14]
    for start, end in zip(edges, edges[1:], strict=False):
        assert set(index[16 * start : 16 * end].tolist()) == set(range(start, end))
