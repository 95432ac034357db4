"""The tables of names: recognise the published models by their tensors, and tell their dims."""

import pytest
import torch
from safetensors.torch import load_file

from skyrun.kernels.files.names import recognise
from skyrun.kernels.name_tables import CLIP_VISION, UMT5_ENCODER, WAN_AUDIO_TRANSFORMER, WAN_TRANSFORMER, WAN_VAE


def test_the_table_of_the_autoencoder_is_that_of_the_published_files(checkpoint):
    names = {row.name(1): row.name() for row in WAN_VAE.expand()}
    diffusers = load_file(checkpoint / "vae/diffusion_pytorch_model.safetensors")
    original = torch.load(checkpoint.parent / "v2v-tiny/Wan2.1_VAE.pth", weights_only=True)
    assert {names[name] for name in diffusers} == original.keys()


REAL = {
    "r2v": (WAN_TRANSFORMER, {"dim": 5120, "in": 16, "out": 16, "ffn": 13824, "text": 4096, "freq": 256, "layers": 40}),
    "a2v": (
        WAN_AUDIO_TRANSFORMER,
        {"dim": 5120, "in": 36, "out": 16, "ffn": 13824, "text": 4096, "freq": 256, "layers": 40, "image": 1280}
        | {"audio_window": 5, "middle_window": 8, "audio_features": 12 * 768, "audio_hidden": 512, "audio_dim": 768}
        | {"context_tokens": 32},
    ),
    "umt5": (
        UMT5_ENCODER,
        {"vocab": 256384, "dim": 4096, "inner": 4096, "ffn": 10240, "heads": 64, "buckets": 32, "layers": 24},
    ),
    "vae": (WAN_VAE, {"base": 96, "z": 16, "layers": 0}),
    "clip": (
        CLIP_VISION,
        {"dim": 1280, "ffn": 5120, "patch": 14, "positions": 257, "projection": 1024, "layers": 32},
    ),
}


@pytest.mark.parametrize("model", REAL)
def test_the_dims_of_the_published_models_follow_from_their_tensors(model):
    table, dims = REAL[model]
    for naming in table.namings:
        shapes = {f"some.{name}": shape for name, shape in table.shapes(naming, dims).items()}
        (match,) = recognise(shapes, [WAN_TRANSFORMER, WAN_AUDIO_TRANSFORMER, UMT5_ENCODER, WAN_VAE, CLIP_VISION])
        assert (match.table.role, match.prefix) == (table.role, "some.")
        assert match.check(shapes, {"audio_window": 5}) == ({"audio_window": 5} | dims, [])
