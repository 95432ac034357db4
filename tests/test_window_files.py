"""Finished windows of a long clip are kept on disk: the same frames and latents come back, or an error does."""

import numpy as np
import pytest
import torch

from skyrun.engine.window_files import WindowStore
from skyrun.errors import SkyrunError

FRAMES = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), np.uint8)
LATENTS = torch.rand(16, 2, 4, 6)


@pytest.fixture
def store(tmp_path):
    kept = WindowStore(tmp_path / "clip.skyrun", 32, 48)
    kept.begin(0)
    kept.add(FRAMES[:2])
    kept.add(FRAMES[2:])
    kept.finish(LATENTS)
    return kept


def read(store, expected=5):
    frames, latents = store.read(0, expected)
    return np.concatenate(list(frames)), latents


def test_what_was_kept_comes_back(store):
    frames, latents = read(store)
    assert np.array_equal(frames, FRAMES)
    assert torch.equal(latents, LATENTS)
    with pytest.raises(SkyrunError, match="it has 5 frames, expected 9"):
        read(store, 9)


@pytest.mark.parametrize("name", ["clip.0.mkv", "clip.0.safetensors"])
def test_no_flipped_bit_makes_another_clip(store, tmp_path, name):
    path = tmp_path / name
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), max(1, len(whole) // 300)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            frames, latents = read(store)
        except SkyrunError as error:
            assert "what was finished of the clip cannot be read" in error.message
            refused += 1
        else:
            assert np.array_equal(frames, FRAMES)
            assert torch.equal(latents, LATENTS)
    assert refused > 200


@pytest.mark.parametrize("content", [b"", b"x" * 5000], ids=["empty", "noise"])
@pytest.mark.parametrize("name", ["clip.0.mkv", "clip.0.safetensors"])
def test_what_is_no_window(store, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SkyrunError, match="what was finished of the clip cannot be read"):
        read(store)


def test_frames_of_another_size(store, tmp_path):
    with pytest.raises(SkyrunError, match="it has frames of 48 x 32"):
        read(WindowStore(tmp_path / "clip.skyrun", 48, 32))
