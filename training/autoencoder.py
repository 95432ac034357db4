"""The Wan VAE for training: a whole clip in one pass. The runtime's own VAE goes through a clip in groups.

Pictures are [N, C, H, W], channels last; the frames of a clip are neighbours. Near full resolution the layers look at
one frame only: of their kernels in time only the last tap is trained, the others are zero.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.name_tables import WAN_VAE
from training.stage import Weights

BASE = 8  # channels at full resolution
LATENT_CHANNELS = 16
_LEVELS = 4
_LAST = torch.channels_last
_TEMPORAL = 2  # from this level on, layers look at more than one frame


def new_autoencoder(seed: int) -> Weights:
    """Weights of the VAE with names of diffusers, of which every frame passes through alone.

    The encoder keeps the last of two frames where it halves time, and the decoder repeats a frame where it doubles it,
    so that the latents of a clip are those of its frames 0, 4, 8 and so on.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in WAN_VAE.shapes("diffusers", {"base": BASE, "z": LATENT_CHANNELS}).items():
        weight = torch.zeros(shape)
        if name.endswith("gamma"):
            weight.fill_(1)
        elif "time_conv.weight" in name:
            for part in weight.split(shape[1]):
                part[:, :, 2, 0, 0] = torch.eye(shape[1])
        elif name.endswith("weight"):
            kernel = weight[:, :, -1] if weight.dim() == 5 else weight
            kernel.normal_(std=kernel[0].numel() ** -0.5, generator=generator)
            if name.endswith("conv2.weight"):
                kernel.mul_(0.3)
        weights[name] = weight.requires_grad_()
    return weights


class Autoencoder:
    """Encodes pictures and decodes clips with given weights."""

    def __init__(self, weights: Weights) -> None:
        self._w = weights

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures in -1 to 1, [N, 3, H, W] -> mean and log-variance of their latents, [N, 16, H/8, W/8] each."""
        x = self._conv(pictures.contiguous(memory_format=_LAST), "encoder.conv_in")
        for index in range(3 * _LEVELS - 1):
            name = f"encoder.down_blocks.{index}"
            if f"{name}.resample.1.weight" in self._w:
                x = F.conv2d(F.pad(x, (0, 1, 0, 1)), *self._pair(f"{name}.resample.1"), stride=2)
            else:
                x = self._residual(x, name)
        x = self._middle(x, "encoder.mid_block", None)
        x = self._conv(self._active(x, "encoder.norm_out"), "encoder.conv_out")
        mean, log_variance = self._conv(x, "quant_conv").chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor, frames: int | None = None) -> Tensor:
        """Latents [N, 16, h, w] -> pictures [N', 3, 8h, 8w].

        frames: latent frames of a clip, of which each after the first becomes four; None stands for single pictures.
        """
        x = self._conv(latents.contiguous(memory_format=_LAST), "post_quant_conv")
        x = self._middle(self._conv(x, "decoder.conv_in", frames), "decoder.mid_block", frames)
        for level in range(_LEVELS):
            name = f"decoder.up_blocks.{level}"
            for index in range(3):
                x = self._residual(x, f"{name}.resnets.{index}", frames if level < _TEMPORAL else None)
            if level < _LEVELS - 1:
                x, frames = self._double(x, f"{name}.upsamplers.0", frames)
        return self._conv(self._active(x, "decoder.norm_out"), "decoder.conv_out")

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self._w[f"{name}.weight"], self._w[f"{name}.bias"]

    def _conv(self, x: Tensor, name: str, frames: int | None = None) -> Tensor:
        """A causal convolution; of single pictures only the last tap in time matters."""
        weight, bias = self._pair(name)
        pad = weight.shape[3] // 2
        if frames is None:
            return F.conv2d(x, weight[:, :, -1], bias, padding=pad)
        return F.conv2d(_with_past(x, frames), weight.transpose(1, 2).flatten(1, 2), bias, padding=pad)

    def _active(self, x: Tensor, name: str) -> Tensor:
        return F.silu(_norm(x, self._w[f"{name}.gamma"].view(1, -1, 1, 1)))

    def _residual(self, x: Tensor, name: str, frames: int | None = None) -> Tensor:
        skip = self._conv(x, f"{name}.conv_shortcut") if f"{name}.conv_shortcut.weight" in self._w else x
        x = self._conv(self._active(x, f"{name}.norm1"), f"{name}.conv1", frames)
        return skip + self._conv(self._active(x, f"{name}.norm2"), f"{name}.conv2", frames)

    def _middle(self, x: Tensor, name: str, frames: int | None) -> Tensor:
        x = self._residual(x, f"{name}.resnets.0", frames)
        count, channels, height, width = x.shape
        normed = _norm(x, self._w[f"{name}.attentions.0.norm.gamma"].view(1, -1, 1, 1))
        qkv = F.conv2d(normed, *self._pair(f"{name}.attentions.0.to_qkv"))
        q, k, v = qkv.flatten(2).transpose(1, 2).chunk(3, 2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, channels, height, width)
        x = x + F.conv2d(mixed.contiguous(memory_format=_LAST), *self._pair(f"{name}.attentions.0.proj"))
        return self._residual(x, f"{name}.resnets.1", frames)

    def _double(self, x: Tensor, name: str, frames: int | None) -> tuple[Tensor, int | None]:
        """Double time, except for the first frame, then space."""
        if frames is not None and f"{name}.time_conv.weight" in self._w:
            clips = x.unflatten(0, (-1, frames))
            later = clips[:, 1:].flatten(0, 1).contiguous(memory_format=_LAST)
            later = self._conv(later, f"{name}.time_conv", frames - 1)
            later = later.unflatten(1, (2, -1)).unflatten(0, (-1, frames - 1)).flatten(1, 2)
            frames = 2 * frames - 1
            x = torch.cat((clips[:, :1], later), 1).flatten(0, 1).contiguous(memory_format=_LAST)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(x, *self._pair(f"{name}.resample.1"), padding=1), frames


def _with_past(x: Tensor, frames: int) -> Tensor:
    """Every frame with the two before it, along the channels: [N, C, H, W] -> [N, 3C, H, W]."""
    clips = F.pad(x.unflatten(0, (-1, frames)), (0, 0, 0, 0, 0, 0, 2, 0))
    past = torch.cat((clips[:, :-2], clips[:, 1:-1], clips[:, 2:]), 2)
    return past.flatten(0, 1).contiguous(memory_format=_LAST)


def _norm(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over the channels: the VAE's norm, as x / |x| * sqrt(C) * gamma is the same."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * gamma
