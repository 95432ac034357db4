"""Encoders of pictures and speech, loudness, colours and noise levels against what upstream computes."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from skyrun.events import drain
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.media.color_match import match_colors
from skyrun.media.image import open_image
from skyrun.media.loudness import loudness, normalised, weighting
from skyrun.media.pixels import crop_portrait
from skyrun.models import wav2vec2
from skyrun.models.clip import CLIPVision
from skyrun.models.wav2vec2 import Wav2Vec2
from skyrun.pipelines.samplers import Euler
from skyrun.tasks.sizes import PORTRAIT_BUCKETS, nearest_bucket

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("inference")


def worst(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


def test_clip(goldens, converted):
    golden = goldens("clip/visual_48x40")
    clip = CLIPVision(open_gguf(next(converted("F32", "a2v").glob("clip*.gguf"))))
    clip.check()
    picture = (golden["in.image_u8"].permute(2, 0, 1) / 255 - 0.5) * 2
    assert worst(clip._pixels(picture)[:, :16, :16], golden["out.pixels_16x16"][0]) < 1e-5
    with clip.open_stream(CPU) as stream:
        tokens = drain(clip.encode(picture, stream, CPU))
    assert worst(tokens, golden["out.tokens"][0]) < 2e-5


@pytest.fixture(scope="module")
def encoder(converted):
    return Wav2Vec2(next(converted("F32", "a2v").glob("wav2vec2*.safetensors")), CPU)


def test_wav2vec2(goldens, encoder):
    golden = goldens("wav2vec2/speech_1.03s")
    wave = golden["in.wave_i16"].numpy() / 32768
    assert loudness(wave, 16000) == pytest.approx(golden.notes["integrated_loudness_lufs"], abs=1e-5)
    loud = torch.from_numpy(normalised(wave, 16000))
    assert worst(loud[:1000].float(), golden["out.loudness_normalised_first1000"]) < 1e-6
    embedding = torch.stack(list(encoder.encode(loud, golden.notes["frames"])), 1)
    assert worst(embedding, golden["out.embedding"]) < 2e-5


def test_features_are_the_same_in_parts(goldens, encoder, monkeypatch):
    golden = goldens("wav2vec2/speech_1.03s")
    wave = golden["in.wave_i16"].float() / 32768
    wave = (wave - wave.mean()) / wave.std(correction=0)
    whole = encoder.features(wave)
    assert whole.shape == (32, golden.notes["conv_frames"])
    assert encoder.shortest == 400
    for kept in (1, 7, 50):
        monkeypatch.setattr(wav2vec2, "_CHUNK", kept)
        assert worst(encoder.features(wave), whole) < 1e-5


def test_loudness_of_tones(goldens):
    golden = goldens("loudness/bs1770_16k")
    np.testing.assert_allclose(weighting(16000)[:64], golden["out.k_weighting_impulse64"].numpy(), atol=1e-12)
    time = np.arange(32000) / 16000
    for name, expected in golden.notes["tones_2s_lufs"].items():
        frequency, amplitude = name.split("Hz_amp")
        tone = float(amplitude) * np.sin(2 * np.pi * float(frequency) * time)
        assert loudness(tone, 16000) == pytest.approx(expected, abs=1e-5)
        assert loudness(normalised(tone, 16000), 16000) == pytest.approx(-23, abs=1e-9)


def test_loudness_leaves_out_what_is_quiet():
    tone = 0.25 * np.sin(2 * np.pi * 997 * np.arange(32000) / 16000)
    alone = loudness(tone, 16000)
    for quiet in (0.0, 1e-5, 1e-3):  # below the absolute gate, and below the relative one
        louder = np.concatenate((tone, quiet * np.tile(tone, 4)))
        assert alone - 0.5 < loudness(louder, 16000) < alone + 0.01


def test_silence_stays_silent():
    silence = np.zeros(16000)
    assert loudness(silence, 16000) == -math.inf
    assert not normalised(silence, 16000).any()


def test_loudness_agrees_with_pyloudnorm():
    pyloudnorm = pytest.importorskip("pyloudnorm")
    rng = np.random.default_rng(3)
    for seconds in (0.4, 0.43, 1.0, 3.217):
        wave = rng.normal(0, 0.1, int(16000 * seconds)) * np.linspace(0, 1, int(16000 * seconds)) ** 3
        assert loudness(wave, 16000) == pytest.approx(pyloudnorm.Meter(16000).integrated_loudness(wave), abs=1e-5)


def test_colours(goldens):
    golden = goldens("preprocess/match_and_blend_colors")
    matched = match_colors(golden["in.source"][0], golden["in.reference"][0, :, 0])
    assert worst(matched, golden["out.strength1"][0]) < 1e-4


def test_colours_of_flat_frames_are_the_pictures_mean():
    picture = torch.rand(3, 8, 8) * 2 - 1
    matched = match_colors(torch.full((3, 2, 8, 8), 0.1), picture)
    assert torch.isfinite(matched).all()
    assert float(matched.flatten(2).std(2).max()) < 1e-3


@pytest.mark.parametrize("steps", [4, 8])
def test_euler(goldens, steps):
    golden = goldens(f"schedulers/a2v_euler_shift11_{steps}")
    sampler, sample = Euler(steps, 11.0), golden["in.x0"]
    assert worst(torch.tensor([*sampler.timesteps, 0.0]), golden["out.timesteps"]) < 1e-4
    for index, (velocity, expected) in enumerate(zip(golden["in.model_out"], golden["out.traj"], strict=True)):
        sampler = Euler.restored(sampler.state()[1], {})
        sample = sampler.step(velocity, sample)
        assert worst(sample, expected) < 1e-5
        assert sampler.index == index + 1


@pytest.mark.parametrize(("name", "mode"), [("a.gif", "P"), ("a.jpg", "CMYK"), ("a.png", "L"), ("a.png", "RGBA")])
def test_portraits_as_people_have_them(tmp_path, name, mode):
    """Of an animated one the first frame counts; alpha is dropped."""
    first, second = (Image.new("RGB", (70, 40), colour) for colour in ((200, 30, 40), (0, 255, 0)))
    more = {"save_all": True, "append_images": [second]} if name == "a.gif" else {}
    first.convert(mode).save(tmp_path / name, **more)
    portrait = crop_portrait(open_image(tmp_path / name), 32, 48)
    assert (portrait.size, portrait.mode) == ((48, 32), "RGB")
    expected = (83, 83, 83) if mode == "L" else (200, 30, 40)
    assert abs(np.array(portrait).astype(int) - expected).max() <= (30 if mode == "P" else 6)  # dithered


def test_portraits_are_cropped_as_upstream_does(goldens):
    golden = goldens("preprocess/resize_and_centercrop")
    for index in range(4):
        expected = golden[f"out.image{index}"][0, :, 0].permute(1, 2, 0).numpy()
        image = Image.fromarray(golden[f"in.image{index}"].numpy())
        assert np.array_equal(np.array(crop_portrait(image, *expected.shape[:2])), expected)


def test_sizes_of_portraits(request):
    rows = json.loads((request.path.parent / "data/goldens/size_buckets/table.json").read_text())["rows"]
    for row in rows:
        for resolution in ("480P", "720P"):
            found = nearest_bucket(PORTRAIT_BUCKETS, resolution, row["height"], row["width"])
            assert list(found) == row[f"a2v_{resolution}"]
