"""Slabs of frames: they cover every row once, and the autoencoder gives the same with them as without."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skyrun.media.pixels import to_uint8
from skyrun.models.slabs import cut
from skyrun.models.vae import WanVAE
from skyrun.models.vae_memory import Memory

CPU = torch.device("cpu")
SIZE = 96, 64
WHOLE = [SIZE, (192, 64), (96, 1000)]
LIMIT = 2e-5  # rounding; a level of 255 is 8e-3
PARTS = [(48, 64), (96, 40), (33, 64), (17, 64), (8, 8), (1, 1)]
pytestmark = pytest.mark.usefixtures("inference")


@given(st.integers(1, 200), st.integers(1, 50), st.tuples(st.integers(1, 300), st.integers(1, 60)), st.integers(0, 3))
def test_every_row_is_given_once_and_sees_its_neighbours(height, width, tile, margin):
    slabs = cut(height, width, tile, margin)
    rows = list(range(height))
    assert [row for slab in slabs for row in rows[slab.rows]] == rows
    for slab in slabs:
        given, seen = rows[slab.rows], rows[slab.reach]
        assert seen[slab.inside] == given
        assert seen == rows[max(0, given[0] - margin) : given[-1] + margin + 1]
        assert len(given) * width <= tile[0] * tile[1] or len(given) == 1
    assert max(len(rows[slab.rows]) for slab in slabs) - min(len(rows[slab.rows]) for slab in slabs) <= 1


def test_without_a_tile_frames_stay_whole():
    (slab,) = cut(720, 1280, None, 1)
    assert slab.rows == slab.reach == slab.inside == slice(0, 720)


@pytest.fixture(scope="module")
def path(converted):
    return next(converted("F32").glob("*.safetensors"))


@pytest.fixture(scope="module")
def latents():
    return torch.randn(16, 3, SIZE[0] // 8, SIZE[1] // 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def video():
    return torch.rand(3, 9, *SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1


def decode(vae, latents):
    return torch.cat(list(vae.decode(latents)), 1)


@pytest.fixture(scope="module")
def frames(path, latents):
    with torch.inference_mode():
        return decode(WanVAE(path, CPU), latents)


@pytest.fixture(scope="module")
def encoded(path, video):
    with torch.inference_mode():
        return WanVAE(path, CPU).encode(video)[0]


@pytest.mark.parametrize("tile", WHOLE)
def test_a_tile_that_covers_everything_changes_no_bit(path, latents, video, frames, encoded, tile):
    vae = WanVAE(path, CPU, tile=tile)
    assert torch.equal(decode(vae, latents), frames)
    assert torch.equal(vae.encode(video)[0], encoded)


@pytest.mark.parametrize("tile", PARTS)
def test_tiles_change_no_level(path, latents, video, frames, encoded, tile):
    vae = WanVAE(path, CPU, tile=tile)
    tiled = decode(vae, latents)
    torch.testing.assert_close(tiled, frames, rtol=0, atol=LIMIT)
    levels, expected = to_uint8(tiled).astype(int), to_uint8(frames).astype(int)
    assert abs(levels - expected).max() <= 1  # halves may round either way
    assert (levels != expected).mean() < 1e-3
    torch.testing.assert_close(vae.encode(video)[0], encoded, rtol=0, atol=LIMIT)


def test_tiles_add_nothing_to_the_error_of_half_precision(path, latents, frames):
    whole, tiled = (decode(WanVAE(path, CPU, torch.bfloat16, tile), latents[:, :2]) for tile in (None, (24, 64)))
    assert (tiled - whole).abs().mean() < 0.1 * (whole - frames[:, :5]).abs().mean()


@pytest.mark.parametrize("room", [0, 1_000_000])
def test_what_waits_on_the_host_changes_no_bit(path, latents, room):
    tile = (48, 64)
    expected = decode(WanVAE(path, CPU, tile=tile), latents)
    assert torch.equal(decode(WanVAE(path, CPU, tile=tile, room=room), latents), expected)


@pytest.mark.parametrize(("room", "parked"), [(None, 0), (0, 300), (100, 200), (250, 100), (300, 0)])
def test_memory_keeps_what_there_is_room_for(room, parked):
    memory, back = Memory(CPU, room), torch.empty(25)
    for group in range(2):  # places stay as they are
        for slab in range(3):
            memory.keep(torch.full((25,), 10.0 * group + slab), "layer", slab)
    for slab in range(3):
        memory.recall(back, "layer", slab)
        assert (back == 10 + slab).all()
    assert memory.parked_bytes == parked
    assert not memory.holds("another layer")
    memory.last_group = True  # what nobody will recall is not kept
    memory.keep(torch.zeros(25), "layer", 0)
    memory.recall(back, "layer", 0)
    assert (back == 10).all()
    memory.close()
    assert not memory.holds("layer", 0)
