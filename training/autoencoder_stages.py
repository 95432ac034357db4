"""The two stages that train the VAE: on single pictures, then the decoder on what lies between latent frames."""

import math

import numpy as np
import torch
from torch import Tensor

from training.autoencoder import Autoencoder
from training.clips import SIZES, TRAINED, draw_clip, draw_pictures
from training.muon import Optimizer
from training.stage import Losses, Random, Stage, Weights

_PICTURES = 8  # of a step
_CLIP = 9  # frames of a clip that the decoder is trained on, three latent frames
_CLIPS = 2
_KL = 1e-4


def pictures_stage(weights: Weights, steps: int) -> Stage:
    """Train encoder and decoder on single pictures: what they lose, and a little of the KL divergence."""
    coder = Autoencoder(weights)

    def loss(step: int, random: Random) -> tuple[Tensor, Losses]:
        pictures = as_tensor(draw_pictures(SIZES[step % len(SIZES)], _PICTURES, random.draw))
        mean, log_variance = coder.encode(pictures)
        latents = mean + torch.exp(0.5 * log_variance) * random.normal(mean)
        lost, said = _lost(coder.decode(latents), pictures)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return lost + _KL * divergence, said | {"divergence": divergence.item()}

    trained = {name: weight for name, weight in weights.items() if "time_conv" not in name}
    return Stage("pictures", steps, trained, _optimizer(trained, 0.02, 4e-3), loss)


def clips_stage(weights: Weights, steps: int) -> Stage:
    """Train the decoder to make four frames of every latent frame after the first. The encoder stays as it is."""
    coder = Autoencoder(weights)

    def loss(step: int, random: Random) -> tuple[Tensor, Losses]:
        size = SIZES[step % len(SIZES)]
        topics = [TRAINED[index] for index in random.draw.integers(len(TRAINED), size=_CLIPS)]
        whole = [draw_clip(topic, size, 17, random.draw).frames for topic in topics]
        starts = [4 * random.draw.integers(3) for _ in topics]
        frames = as_tensor(
            np.concatenate([clip[start : start + _CLIP] for clip, start in zip(whole, starts, strict=True)])
        )
        with torch.no_grad():
            mean, log_variance = coder.encode(frames.unflatten(0, (-1, _CLIP))[:, ::4].flatten(0, 1))
            latents = mean + torch.exp(0.5 * log_variance) * random.normal(mean)
        return _lost(coder.decode(latents, _CLIP // 4 + 1), frames)

    trained = {name: weight for name, weight in weights.items() if name.startswith(("decoder", "post_quant"))}
    return Stage("clips", steps, trained, _optimizer(trained, 0.015, 2e-3), loss)


def as_tensor(pictures: np.ndarray) -> Tensor:
    """Pictures [N, H, W, 3] in 0 to 1 -> [N, 3, H, W] in -1 to 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1


def _lost(made: Tensor, wanted: Tensor) -> tuple[Tensor, Losses]:
    error = made - wanted
    square = error.square().mean()
    return square + 0.2 * error.abs().mean(), {"psnr": 10 * math.log10(4 / square.item())}


def _optimizer(trained: Weights, muon: float, adam: float) -> Optimizer:
    """Muon for kernels, except for those whose input or output are pixels."""
    pixels = {id(trained.get("encoder.conv_in.weight")), id(trained["decoder.conv_out.weight"])}
    return Optimizer(trained.values(), lambda w: w.dim() >= 4 and w.numel() > 200 and id(w) not in pixels, muon, adam)
