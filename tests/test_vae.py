"""The autoencoder: decoding in 16 bits, the resampler against its definition, the clip's first frame."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import skyrun.demo
from skyrun.demo.words import COLOURS
from skyrun.demo.world import composed, scene_picture
from skyrun.models.vae import WanVAE
from skyrun.models.vae_memory import Memory
from skyrun.quant import convert

CPU = torch.device("cpu")
SIZE, FRAMES = (32, 48), 5
pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The file of the trained autoencoder that comes with skyrun."""
    folder = tmp_path_factory.mktemp("trained")
    convert(next(iter(skyrun.demo.__path__)) + "/checkpoint/vae", folder)
    return next(folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def latents(trained):
    """Of a clip in which a ball crosses the sea."""
    along = np.linspace(0, 1, FRAMES)
    scene = scene_picture("sea", SIZE, np.random.default_rng(1))
    colour = np.asarray(next(iter(COLOURS.values())), np.float32) / 255
    frames = composed("ball", colour, scene, 10 + 25 * along, 15 + 5 * along, np.full(FRAMES, 7.0), 3 * along)
    vae = WanVAE(trained, CPU)
    with torch.inference_mode():
        return vae.normalise(vae.encode(torch.from_numpy(frames).movedim(3, 0) * 2 - 1)[0])


def decoded(path, latents, dtype):
    return torch.cat(list(WanVAE(path, CPU, dtype).decode(latents)), 1)


def test_decoding_in_bfloat16_changes_no_byte_by_more_than_rounding(trained, latents):
    exact, rounded = (decoded(trained, latents, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert exact.std() > 0.2  # a picture
    assert 10 * torch.log10(4 / (exact - rounded).square().mean()) > 58  # dB; rounding to bytes has 59


def test_float16_cannot_hold_what_a_decoder_computes(trained, latents):
    """Which is why plans never take it, not even for cards without bfloat16."""
    assert not decoded(trained, latents[:, :1], torch.float16).isfinite().all()


def test_doubling_space_is_a_convolution_of_repeated_pixels(trained):
    from safetensors.torch import load_file

    vae, weights, name = WanVAE(trained, CPU), load_file(trained), "decoder.upsamples.3"
    weight, bias = (weights[f"{name}.resample.1.{part}"].float() for part in ("weight", "bias"))
    x = torch.randn(2, 5, 7, weight.shape[1])
    repeated = x.permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(repeated, weight, bias, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(vae._double(x, name), expected, rtol=1e-4, atol=1e-5)


def test_before_the_first_frame_there_are_zeros(trained):
    """One frame is convolved with the last of three taps; that is what three taps make of it after zeros."""
    vae, name = WanVAE(trained, CPU), "decoder.middle.0.residual.6"
    first, memory = Memory(CPU, None), Memory(CPU, None)
    x = torch.randn(1, 5, 7, vae._weights[f"{name}.weight"].shape[1])
    memory.keep(torch.zeros(2, *x.shape[1:]), name)
    torch.testing.assert_close(vae._conv(x, name, first), vae._conv(x, name, memory))
    kept = torch.empty(2, 2, *x.shape[1:])
    first.recall(kept[0], name)
    memory.recall(kept[1], name)
    assert torch.equal(kept[0], kept[1]) and not kept[0][0].any() and torch.equal(kept[0][1], x[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_are_last(trained, monkeypatch, dtype):
    """In every weight of a convolution, and in whatever enters one."""
    vae, entered = WanVAE(trained, CPU, dtype), []
    for name, layout in (("conv2d", torch.channels_last), ("conv3d", torch.channels_last_3d)):
        convolve = getattr(F, name)

        def watched(x, *given, convolve=convolve, layout=layout, **how):
            entered.append(x.is_contiguous(memory_format=layout))
            return convolve(x, *given, **how)

        monkeypatch.setattr(F, name, watched)
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    convolutions = [weight for weight in vae._weights.values() if weight.ndim > 3]
    assert len(convolutions) > 50
    assert all(weight.is_contiguous(memory_format=layouts[weight.ndim]) for weight in convolutions)
    for _ in vae.decode(torch.randn(16, 2, 4, 6)):
        pass
    vae.encode(torch.randn(3, 5, 32, 48))
    assert len(entered) > 100 and all(entered)
