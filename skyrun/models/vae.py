"""The Wan video autoencoder: pixels to latents and back, eight times smaller in space and four in time.

Both ways work through time in groups and remember the last frames that each convolution saw, so memory does not grow
with the length of the clip. Weights have original Wan names; the structure is read off them.
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.kernels.safetensors_header import read_safetensors_header

# Statistics of the latents that the diffusion models were trained on; the same for every Wan 2.1 autoencoder.
_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
LATENT_CHANNELS = 16
_FLOAT = ("F32", "F16", "BF16")
_GROUP = 4  # frames per latent frame, after the first

Memory = dict[str, Tensor]


class WanVAE:
    """The autoencoder's weights on a device. Latents are normalised: mean 0 and deviation 1 per channel."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._path, self._device, self._dtype = path, device, dtype
        self._weights, metadata = (_shapes if device.type == "meta" else _load)(path, device, dtype)
        self._mean = self._statistics(metadata, "latents_mean", _LATENTS_MEAN)
        self._std = self._statistics(metadata, "latents_std", _LATENTS_STD)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [3, T, H, W] in [-1, 1] -> mean and log-variance, float32 [16, 1 + (T-1)//4, H/8, W/8] each.

        Not normalised. Frames after the last whole group of four are dropped.
        """
        memory: Memory = {}
        groups = []
        for start in [0, *range(1, video.shape[1] - _GROUP + 1, _GROUP)]:
            group = video[:, start : start + (_GROUP if start else 1)]
            x = self._encoder(group.unsqueeze(0).to(self._device, self._dtype), memory)
            groups.append(self._conv(x, "conv1", memory))
        mean, log_variance = torch.cat(groups, 2).squeeze(0).float().chunk(2)
        return mean, log_variance.clamp(-30, 20)

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents [16, F, h, w] -> normalised ones."""
        return (latents - self._mean) / self._std

    def sample(self, video: Tensor, noise: Tensor) -> Tensor:
        """Normalised latents drawn from the posterior of pixels [3, T, H, W], with noise [16, F, h, w]."""
        mean, log_variance = self.encode(video)
        return self.normalise(mean + torch.exp(0.5 * log_variance) * noise.to(self._device))

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Normalised latents [16, F, h, w] -> pixels in [-1, 1], first [3, 1, H, W], then [3, 4, H, W] per latent."""
        memory: Memory = {}
        raw = latents.to(self._device, torch.float32) * self._std + self._mean
        for frame in raw.to(self._dtype).split(1, 1):
            x = self._conv(frame.unsqueeze(0), "conv2", memory)
            yield self._decoder(x, memory).squeeze(0).float().clamp(-1, 1)

    def _statistics(self, metadata: dict[str, str], key: str, default: tuple[float, ...]) -> Tensor:
        said = json.loads(metadata.get("skyrun", "{}"))
        values = said.get(key, default) if isinstance(said, dict) else default
        numbers = isinstance(values, (list, tuple)) and [v for v in values if isinstance(v, (int, float))]
        if not numbers or len(numbers) != len(values) or len(values) != LATENT_CHANNELS:
            raise SkyrunError(
                f"{self._path} says {key} = {values}, expected {LATENT_CHANNELS} numbers", "convert it again"
            )
        return torch.tensor(values, dtype=torch.float32, device=self._device).view(-1, 1, 1, 1)

    def _w(self, name: str) -> Tensor:
        if name not in self._weights:
            raise SkyrunError(f"{self._path} has no tensor {name}", "convert or download the autoencoder again")
        return self._weights[name]

    def _encoder(self, x: Tensor, memory: Memory) -> Tensor:
        x = self._conv(x, "encoder.conv1", memory)
        for name in self._stack("encoder.downsamples"):
            x = self._residual(x, name, memory) if self._is_residual(name) else self._downsample(x, name, memory)
        return self._tail(self._middle(x, "encoder.middle", memory), "encoder.head", memory)

    def _decoder(self, x: Tensor, memory: Memory) -> Tensor:
        x = self._middle(self._conv(x, "decoder.conv1", memory), "decoder.middle", memory)
        for name in self._stack("decoder.upsamples"):
            x = self._residual(x, name, memory) if self._is_residual(name) else self._upsample(x, name, memory)
        return self._tail(x, "decoder.head", memory)

    def _stack(self, prefix: str) -> list[str]:
        """Names of the layers `prefix.0`, `prefix.1`, ... that the file has."""
        names = {".".join(name.split(".")[:3]) for name in self._weights if name.startswith(prefix + ".")}
        return [f"{prefix}.{index}" for index in range(len(names))]

    def _is_residual(self, name: str) -> bool:
        return f"{name}.resample.1.weight" not in self._weights

    def _conv(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """A convolution that sees no later frame: its past comes from memory, zeros before the first frame."""
        weight = self._w(f"{name}.weight")
        taps, side = weight.shape[2], weight.shape[3]
        if taps > 1:
            past = memory.get(name)
            if past is None:
                past = x.new_zeros(*x.shape[:2], taps - 1, *x.shape[3:])
            x = torch.cat((past, x), 2)
            memory[name] = x[:, :, 1 - taps :].clone()
        return F.conv3d(x, weight, self._w(f"{name}.bias"), padding=(0, side // 2, side // 2))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """Unit length over the channels, times sqrt(C) * gamma."""
        gamma = self._w(f"{name}.gamma").view(1, -1, 1, 1, 1)
        scale: Tensor = x.shape[1] ** 0.5 * gamma
        return F.normalize(x, dim=1) * scale

    def _residual(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        h = self._conv(F.silu(self._norm(x, f"{name}.residual.0")), f"{name}.residual.2", memory)
        h = self._conv(F.silu(self._norm(h, f"{name}.residual.3")), f"{name}.residual.6", memory)
        return h + (self._conv(x, f"{name}.shortcut", memory) if f"{name}.shortcut.weight" in self._weights else x)

    def _middle(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        x = self._residual(x, f"{name}.0", memory)
        x = x + self._attention(self._norm(x, f"{name}.1.norm"), f"{name}.1")
        return self._residual(x, f"{name}.2", memory)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        """One head over the pixels of each frame. x [1, C, T, H, W]."""
        _, channels, frames, height, width = x.shape
        flat = x.squeeze(0).transpose(0, 1)
        qkv = F.conv2d(flat, self._w(f"{name}.to_qkv.weight"), self._w(f"{name}.to_qkv.bias"))
        q, k, v = qkv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, 3)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        out = mixed.reshape(frames, channels, height, width)
        out = F.conv2d(out, self._w(f"{name}.proj.weight"), self._w(f"{name}.proj.bias"))
        return out.transpose(0, 1).unsqueeze(0)

    def _tail(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        return self._conv(F.silu(self._norm(x, f"{name}.0")), f"{name}.2", memory)

    def _spatial(self, x: Tensor, name: str, **settings: Any) -> Tensor:
        """The 2-D convolution of a resampler, frame by frame. x [1, C, T, H, W]."""
        frames = F.conv2d(
            x.squeeze(0).transpose(0, 1),
            self._w(f"{name}.resample.1.weight"),
            self._w(f"{name}.resample.1.bias"),
            **settings,
        )
        return frames.transpose(0, 1).unsqueeze(0)

    def _downsample(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """Halve space; then, after the first frame, halve time over this group and the last frame before it."""
        x = self._spatial(F.pad(x, (0, 1, 0, 1)), name, stride=2)
        if f"{name}.time_conv.weight" not in self._weights:
            return x
        before = memory.get(name)
        memory[name] = x[:, :, -1:].clone()
        if before is None:
            return x
        weight, bias = self._w(f"{name}.time_conv.weight"), self._w(f"{name}.time_conv.bias")
        return F.conv3d(torch.cat((before, x), 2), weight, bias, stride=(2, 1, 1))

    def _upsample(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """Double time, except of the first frame; then double space.

        The first frame is not part of the time convolution's past: that begins with zeros at the second group.
        """
        if f"{name}.time_conv.weight" in self._weights:
            if name in memory:
                pairs = self._conv(x, f"{name}.time_conv", memory)
                even, odd = pairs.chunk(2, 1)
                x = torch.stack((even, odd), 3).flatten(2, 3)
            memory[name] = x.new_empty(0)
        _, _, frames, height, width = x.shape
        x = F.interpolate(x, size=(frames, height * 2, width * 2), mode="nearest")
        return self._spatial(x, name, padding=1)


def read_vae_dims(path: Path) -> tuple[int, int]:
    """Channels of the autoencoder's widest level, and the number of its weights, from the file's header."""
    tensors = read_safetensors_header(path).tensors
    head = tensors.get("decoder.head.2.weight")
    if head is None or len(head.shape) != 5:
        raise SkyrunError(f"{path} is not a Wan autoencoder with original names", "convert the published checkpoint")
    return head.shape[1], sum(prod(tensor.shape) for tensor in tensors.values())


def check_vae(path: Path) -> None:
    """Encode and decode on shapes alone. SkyrunError if a tensor is missing or does not fit the others."""
    try:
        vae = WanVAE(path, torch.device("meta"))
        vae.encode(torch.empty(3, 9, 16, 16, device="meta"))
        for pixels in vae.decode(torch.empty(LATENT_CHANNELS, 3, 2, 2, device="meta")):
            assert pixels.shape[2:] == (16, 16)
    except (RuntimeError, ValueError, LookupError) as error:
        raise SkyrunError(
            f"{path} has tensors that do not fit each other: {error}", "convert or download the autoencoder again"
        ) from error


def _shapes(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    header = read_safetensors_header(path)
    strange = [
        f"{name} is {t.dtype}, expected F32, F16 or BF16" for name, t in header.tensors.items() if t.dtype not in _FLOAT
    ]
    if strange:
        raise SkyrunError.listing(f"{path} cannot be used", strange, "convert or download the autoencoder again")
    weights = {name: torch.empty(t.shape, dtype=dtype, device=device) for name, t in header.tensors.items()}
    return weights, header.metadata


def _load(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name).to(device, dtype) for name in names}, file.metadata() or {}
    except FileNotFoundError as error:
        raise SkyrunError(f"{path} does not exist", "check the path", MODEL_MISSING) from error
    except (SafetensorError, OSError) as error:
        raise SkyrunError(f"cannot read {path}: {error}", "convert or download it again") from error
