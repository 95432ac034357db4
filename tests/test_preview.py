"""Pictures of a clip: while it is made, and of all of it at a glance."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from skyrun.engine.preview import Previewer
from skyrun.media.contact_sheet import contact_sheet, places
from skyrun.models.vae import WanVAE
from skyrun.streaming import device
from skyrun.streaming.device import is_out_of_memory, refuse_to_spill

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def vae(converted):
    return next(converted("F32").glob("*.safetensors"))


def test_a_preview_resembles_what_is_decoded(vae):
    """Smooth latents that the map was not fitted to. Random weights are far from linear: half of it is seen at most."""
    previewer, alike = Previewer(vae), []
    for seed in range(6):
        coarse = torch.randn(1, 16, 3, 3, generator=torch.Generator().manual_seed(100 + seed))
        latents = F.interpolate(coarse, size=(12, 12))[0]
        decoded = next(WanVAE(vae, torch.device("cpu")).decode(latents.unsqueeze(1)))[:, 0]
        expected = F.avg_pool2d(decoded, 8).permute(1, 2, 0).numpy()
        picture = previewer.picture(latents)
        assert picture.shape == (48, 48, 3)
        means = picture.reshape(12, 4, 12, 4, 3).mean((1, 3)) / 127.5 - 1
        alike += [np.corrcoef(means[..., c].ravel(), expected[..., c].ravel())[0, 1] for c in range(3)]
    assert np.mean(alike) > 0.3


def test_a_preview_is_a_sheet_of_frames(vae):
    previewer = Previewer(vae)
    for frames, rows in ((1, 1), (5, 2), (33, 3)):
        assert previewer.image(torch.randn(16, frames, 6, 8)).size == (4 * 36 - 4, rows * 28 - 4)


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, [0]), (3, [0, 1, 2]), (5000, None)])
def test_places(count, expected):
    chosen = places(count)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(12, count)
    if count:
        assert (chosen[0], chosen[-1]) == (0, count - 1)
    assert expected is None or chosen == expected


def test_a_large_sheet_fits_a_screen():
    frames = [np.full((720, 1280, 3), 20 * n, np.uint8) for n in range(12)]
    sheet = contact_sheet(frames)
    assert sheet.width == 1600
    cells = [np.array(sheet)[110 + 226 * (n // 4), 200 + 400 * (n % 4), 0] for n in range(12)]
    assert abs(np.array(cells).astype(int) - 20 * np.arange(12)).max() <= 2


@pytest.mark.parametrize(("spills", "free", "raises"), [(True, 50 << 20, 1), (True, 500 << 20, 0), (False, 1, 0)])
def test_memory_is_not_moved_to_the_host(monkeypatch, spills, free, raises):
    monkeypatch.setattr(device, "_SPILLS", spills)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 12 << 30))
    refuse_to_spill(torch.device("cpu"))
    try:
        refuse_to_spill(torch.device("cuda", 0))
    except torch.OutOfMemoryError as error:
        assert raises and is_out_of_memory(error) and "50 MiB of GPU memory are left" in str(error)
    else:
        assert not raises
