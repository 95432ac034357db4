"""Pictures of a clip: while it is made, and of all of it at a glance."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from skyrun.engine.preview import WAN_RGB_MAP, preview_frame, preview_image
from skyrun.kernels.machine.failures import is_out_of_memory
from skyrun.media.contact_sheet import contact_sheet, places
from skyrun.models.vae import WanVAE
from skyrun.streaming import device
from skyrun.streaming.device import refuse_to_spill

PUBLISHED = "SKYRUN_TEST_VAE"  # environment variable

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def vae(converted):
    return next(converted("F32").glob("*.safetensors"))


def fitted_map(path):
    """What the published map was made by: least squares from smooth random latents to the means of their pixels."""
    vae = WanVAE(path, torch.device("cpu"))
    coarse = torch.randn(8, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = F.interpolate(coarse, size=(16, 16), mode="bilinear")
    pixels = torch.stack([next(vae.decode(sample.unsqueeze(1)))[:, 0] for sample in latents])
    inputs = F.pad(latents.transpose(0, 1).flatten(1).T, (0, 1), value=1.0)
    means = F.avg_pool2d(pixels, 8).transpose(0, 1).flatten(1).T
    return torch.linalg.lstsq(inputs, means).solution.tolist()


def likeness(path, rgb_map):
    """How previews of latents that no map was fitted to correlate with what is decoded."""
    alike = []
    for seed in range(6):
        coarse = torch.randn(1, 16, 3, 3, generator=torch.Generator().manual_seed(100 + seed))
        latents = F.interpolate(coarse, size=(12, 12))[0]
        decoded = next(WanVAE(path, torch.device("cpu")).decode(latents.unsqueeze(1)))[:, 0]
        expected = F.avg_pool2d(decoded, 8).permute(1, 2, 0).numpy()
        picture = preview_frame(latents, rgb_map)
        assert picture.shape == (48, 48, 3)
        means = picture.reshape(12, 4, 12, 4, 3).mean((1, 3)) / 127.5 - 1
        alike += [np.corrcoef(means[..., c].ravel(), expected[..., c].ravel())[0, 1] for c in range(3)]
    return np.mean(alike)


def test_a_preview_resembles_what_is_decoded(vae):
    """Random weights are far from linear: half of it is seen at most."""
    assert likeness(vae, fitted_map(vae)) > 0.3


@pytest.mark.skipif(PUBLISHED not in os.environ, reason=f"needs {PUBLISHED}, a file of Wan 2.1's autoencoder")
def test_the_published_map_is_the_fit_to_the_published_autoencoder():
    vae = Path(os.environ[PUBLISHED])
    assert likeness(vae, WAN_RGB_MAP) > 0.8 * likeness(vae, fitted_map(vae))


@pytest.mark.parametrize("channel", range(16))
def test_colours_of_latents(channel):
    """A channel alone, in the middle of a frame, has its row of the map as its colour."""
    latents = torch.zeros(16, 1, 8, 8)
    latents[channel] = 0.5
    (row, offset) = (np.array(WAN_RGB_MAP[index]) for index in (channel, 16))
    expected = ((0.5 * row + offset) / 2 + 0.5) * 255
    assert np.abs(np.array(preview_image(latents))[16, 16] - expected).max() <= 1


def test_values_out_of_range_are_white_or_black():
    large = torch.zeros(16, 1, 8, 8)
    large[14, :, :, :4], large[14, :, :, 4:] = 100, -100
    frame = preview_frame(large[:, 0])
    assert (frame[:, 0] == 255).all() and (frame[:, -1] == 0).all()


def test_a_preview_is_a_sheet_of_frames():
    for frames, rows in ((1, 1), (5, 2), (33, 3)):
        assert preview_image(torch.randn(16, frames, 6, 8)).size == (4 * 36 - 4, rows * 28 - 4)


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
