"""The Wan VAE: encodes pixels to latents, eight times smaller in space and four times in time, and decodes them.

Encoder and decoder process frames in groups and cache the last input frames of each convolution, so memory does not
grow with the length of the clip. Within a group convolutions can be computed slab by slab, and the cache can wait on
the host; neither changes the result. A slab is computed from its own rows and the neighbouring rows that the
convolution depends on, so the slabs join exactly: nothing is blended and there are no seams. Weights have original Wan
names, from which the structure is derived.
"""

from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.kernels.fitting import check_tensors
from skyrun.kernels.name_tables import WAN_VAE
from skyrun.kernels.safetensors_header import own_words, read_safetensors_header

Tile = tuple[int, int]  # height, width in pixels


class Slab(NamedTuple):
    """A range of rows that are computed together, and the rows that they depend on."""

    rows: slice  # of the frame: the rows that are computed
    reach: slice  # of the frame: those rows and the neighbours that they depend on
    inside: slice  # of `reach`: the rows that are computed


def cut(height: int, width: int, tile: Tile | None, margin: int) -> list[Slab]:
    """Cut frames into slabs of about equal height.

    Args:
        height: rows of a frame.
        width: columns of a frame.
        tile: a slab has at most as many pixels as a tile, or one row; None leaves frames whole.
        margin: how many rows above and below an output row depends on.
    """
    most = height if tile is None else max(1, tile[0] * tile[1] // width)
    count = -(-height // most)
    edges = [index * height // count for index in range(count + 1)]
    return [_slab(start, stop, height, margin) for start, stop in zip(edges, edges[1:], strict=False)]


def _slab(start: int, stop: int, height: int, margin: int) -> Slab:
    first, last = max(0, start - margin), min(height, stop + margin)
    return Slab(slice(start, stop), slice(first, last), slice(start - first, stop - first))


# Statistics of the latents that the diffusion models were trained on; they are the same for every Wan 2.1 VAE.
_LARGEST = 1e6  # of statistics that are believed
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
_TINY = 1e-12  # norms are clamped to it before they divide
_HOST = torch.device("cpu")


class Memory:
    """The cache of each layer's last input frames, by layer and slab.

    room: bytes of the device that the cache may take, the rest is on the host; None stands for no limit.
    """

    def __init__(self, room: int | None) -> None:
        self._room = room
        self._frames: dict[tuple[str, int], Tensor] = {}
        self.first_group = True

    def recall(self, layer: str, slab: int = 0) -> Tensor | None:
        return self._frames.get((layer, slab))

    def keep(self, frames: Tensor, layer: str, slab: int = 0) -> None:
        if (layer, slab) not in self._frames:
            device = frames.device
            if self._room is not None:
                device = device if frames.nbytes <= self._room else _HOST
                self._room -= frames.nbytes if device == frames.device else 0
            self._frames[layer, slab] = torch.empty(frames.shape, dtype=frames.dtype, device=device)
        self._frames[layer, slab].copy_(frames)


class WanVAE:
    """The VAE with its weights on a device. Latents are normalised to mean 0 and standard deviation 1 per channel.

    tile: height and width in pixels that a convolution works on at a time; None stands for whole frames. room: bytes of
    the device for the cache of earlier frames, the rest waits on the host; None stands for no limit.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        tile: Tile | None = None,
        room: int | None = None,
    ) -> None:
        self._path, self._device, self._dtype, self._tile, self._room = path, device, dtype, tile, room
        self._weights, metadata = (_shapes if device.type == "meta" else _load)(path, device, dtype)
        self._mean = self._statistics(metadata, "latents_mean", _LATENTS_MEAN)
        self._std = self._statistics(metadata, "latents_std", _LATENTS_STD)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels [3, T, H, W] in [-1, 1] -> mean and log-variance, float32 [16, 1 + (T-1)//4, H/8, W/8] each.

        These are not normalised. Frames after the last whole group of four are dropped.
        """
        return self.encode_groups(video[:, group] for group in groups_of(video.shape[1]))

    def encode_groups(self, groups: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """As `encode`, for a video in groups: [3, 1, H, W] first, then [3, 4, H, W] each."""
        memory, encoded = Memory(self._room), []
        for group in groups:
            x = self._encoder(group.unsqueeze(0).to(self._device, self._dtype), memory)
            encoded.append(self._conv(x, "conv1", memory))
            memory.first_group = False
        mean, log_variance = torch.cat(encoded, 2).squeeze(0).float().chunk(2)
        return mean, log_variance.clamp(-30, 20)

    def normalise(self, latents: Tensor) -> Tensor:
        """Normalise raw latents [16, F, h, w]."""
        return (latents - self._mean) / self._std

    def sample(self, video: Tensor, noise: Tensor) -> Tensor:
        """Sample normalised latents from the posterior of pixels [3, T, H, W] with noise [16, F, h, w]."""
        mean, log_variance = self.encode(video)
        return self.normalise(mean + torch.exp(0.5 * log_variance) * noise.to(self._device))

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode normalised latents [16, F, h, w] and yield pixels in [-1, 1]: [3, 1, H, W], then [3, 4, H, W] each."""
        memory = Memory(self._room)
        raw = latents.to(self._device, torch.float32) * self._std + self._mean
        for frame in raw.to(self._dtype).split(1, 1):
            x = self._conv(frame.unsqueeze(0), "conv2", memory)
            yield self._decoder(x, memory).squeeze(0).float().clamp_(-1, 1)
            memory.first_group = False

    def _statistics(self, metadata: dict[str, str], key: str, default: tuple[float, ...]) -> Tensor:
        values = own_words(metadata).get(key, default)
        numbers = isinstance(values, (list, tuple)) and [
            value for value in values if isinstance(value, (int, float)) and abs(value) < _LARGEST
        ]
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

    def _by_slab(
        self, slabs: list[Slab], compute: Callable[[int, Slab], Tensor], scale: int = 1, onto: Tensor | None = None
    ) -> Tensor:
        """Join the results of `compute` for each slab, or add them to `onto`. scale: result rows per row."""
        if len(slabs) == 1 and onto is None:
            return compute(0, slabs[0])
        out = onto
        for index, slab in enumerate(slabs):
            part = compute(index, slab)
            if out is None:
                out = part.new_empty(*part.shape[:3], slabs[-1].rows.stop * scale, part.shape[4])
            rows = out[:, :, :, slab.rows.start * scale : slab.rows.stop * scale]
            rows.copy_(part) if onto is None else rows.add_(part)
            del part
        assert out is not None
        return out

    def _conv(
        self, x: Tensor, name: str, memory: Memory, norm: str | None = None, onto: Tensor | None = None
    ) -> Tensor:
        """A causal convolution over time. Earlier frames come from memory; before the first frame there are zeros.

        norm: name of a norm that is applied to x first, followed by SiLU. onto: a tensor that the result is added to.
        """
        weight, bias = self._w(f"{name}.weight"), self._w(f"{name}.bias")
        taps, margin = weight.shape[2], weight.shape[3] // 2

        def compute(index: int, slab: Slab) -> Tensor:
            part = x[:, :, :, slab.reach]
            if taps > 1:
                part = self._after_past(part, taps - 1, memory.recall(name, index), norm)
                memory.keep(part[:, :, 1 - taps :], name, index)
            return F.conv3d(part, weight, bias, padding=(0, margin, margin))[:, :, :, slab.inside]

        return self._by_slab(cut(x.shape[3], x.shape[4], self._tile, margin), compute, onto=onto)

    def _after_past(self, x: Tensor, frames: int, past: Tensor | None, norm: str | None) -> Tensor:
        """Concatenate `frames` past frames and x, to which a norm and SiLU are applied if `norm` names one.

        x is copied only once.
        """
        joined = x.new_empty(*x.shape[:2], frames + x.shape[2], *x.shape[3:])
        if past is None:
            joined[:, :, :frames].zero_()
        else:
            joined[:, :, :frames].copy_(past)
        if norm is None:
            joined[:, :, frames:].copy_(x)
        else:
            F.silu(self._norm(x, norm, joined[:, :, frames:]), inplace=True)
        return joined

    def _norm(self, x: Tensor, name: str, out: Tensor) -> Tensor:
        """RMS norm over the channels, written to `out`: x / |x| * sqrt(C) * gamma."""
        gamma = self._w(f"{name}.gamma").view(1, -1, 1, 1, 1)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(_TINY)
        return torch.div(x, length, out=out).mul_(x.shape[1] ** 0.5 * gamma)

    def _residual(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """A residual block of two convolutions. Without a shortcut the sum is computed in place, in x."""
        h = self._conv(x, f"{name}.residual.2", memory, norm=f"{name}.residual.0")
        if f"{name}.shortcut.weight" in self._weights:
            x = self._conv(x, f"{name}.shortcut", memory)
        return self._conv(h, f"{name}.residual.6", memory, norm=f"{name}.residual.3", onto=x)

    def _middle(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        x = self._residual(x, f"{name}.0", memory)
        x += self._attention(self._norm(x, f"{name}.1.norm", torch.empty_like(x)), f"{name}.1")
        return self._residual(x, f"{name}.2", memory)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        """Attention with one head over the pixels of each frame. x [1, C, T, H, W]."""
        _, channels, frames, height, width = x.shape
        flat = x.squeeze(0).transpose(0, 1)
        qkv = F.conv2d(flat, self._w(f"{name}.to_qkv.weight"), self._w(f"{name}.to_qkv.bias"))
        q, k, v = qkv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, 3)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        out = mixed.reshape(frames, channels, height, width)
        out = F.conv2d(out, self._w(f"{name}.proj.weight"), self._w(f"{name}.proj.bias"))
        return out.transpose(0, 1).unsqueeze(0)

    def _tail(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        return self._conv(x, f"{name}.2", memory, norm=f"{name}.0")

    def _spatial(self, frames: Tensor, name: str, **settings: Any) -> Tensor:
        """The 2-D convolution of a resampler. frames [T, C, H, W] -> [1, C', T, H', W']."""
        weight, bias = self._w(f"{name}.resample.1.weight"), self._w(f"{name}.resample.1.bias")
        return F.conv2d(frames, weight, bias, **settings).transpose(0, 1).unsqueeze(0)

    def _downsample(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """Halve space, then time, with the last frame of the group before. Time is not halved in the first group."""
        x = self._halve(x, name)
        if f"{name}.time_conv.weight" not in self._weights:
            return x
        before = memory.recall(name)
        joined = x if before is None else torch.cat((before.to(x.device), x), 2)
        memory.keep(x[:, :, -1:], name)
        if memory.first_group:
            return x
        weight, bias = self._w(f"{name}.time_conv.weight"), self._w(f"{name}.time_conv.bias")
        return F.conv3d(joined, weight, bias, stride=(2, 1, 1))

    def _halve(self, x: Tensor, name: str) -> Tensor:
        """Halve space: row i depends on rows 2i to 2i + 2, columns likewise, with zeros after the last."""
        frames, height = x.squeeze(0).transpose(0, 1), x.shape[3]

        def compute(_: int, slab: Slab) -> Tensor:
            first, last = 2 * slab.rows.start, 2 * slab.rows.stop + 1
            part = F.pad(frames[:, :, first:last], (0, 1, 0, max(0, last - height)))
            return self._spatial(part, name, stride=2)

        return self._by_slab(cut(height // 2, 2 * x.shape[4], self._tile, 0), compute)

    def _upsample(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """Double time, except for the first frame, then double space.

        The time convolution does not see the first frame: before the second group there are zeros.
        """
        if f"{name}.time_conv.weight" in self._weights and not memory.first_group:
            even, odd = self._conv(x, f"{name}.time_conv", memory).chunk(2, 1)
            x = torch.stack((even, odd), 3).flatten(2, 3)
        return self._double(x, name)

    def _double(self, x: Tensor, name: str) -> Tensor:
        """Double space by repeating every pixel four times, followed by a convolution."""
        frames = x.squeeze(0).transpose(0, 1)

        def compute(_: int, slab: Slab) -> Tensor:
            part = F.interpolate(frames[:, :, slab.reach], scale_factor=2, mode="nearest")
            inside = slice(2 * slab.inside.start, 2 * slab.inside.stop)
            return self._spatial(part, name, padding=1)[:, :, :, inside]

        return self._by_slab(cut(x.shape[3], 4 * x.shape[4], self._tile, 1), compute, scale=2)


def groups_of(frames: int) -> list[slice]:
    """The groups that the VAE encodes at a time: the first frame, then whole groups of four frames."""
    return [slice(0, 1), *(slice(start, start + _GROUP) for start in range(1, frames - _GROUP + 1, _GROUP))]


def read_vae_dims(path: Path) -> tuple[int, int]:
    """The channels of the VAE at full resolution and the number of its weights, from the file's header."""
    tensors = read_safetensors_header(path).tensors
    head = tensors.get("decoder.head.2.weight")
    if head is None or len(head.shape) != 5:
        raise SkyrunError(f"{path} is not a Wan autoencoder with original names", "convert the published checkpoint")
    return head.shape[1], sum(prod(tensor.shape) for tensor in tensors.values())


def check_vae(path: Path) -> None:
    """Raise SkyrunError if a tensor is missing or does not fit the others."""
    hint = "convert or download the autoencoder again"
    try:
        vae = WanVAE(path, torch.device("meta"))
    except ValueError as error:
        raise SkyrunError(f"{path} has metadata that is not JSON: {error}", hint) from error
    shapes = {name: tuple(weight.shape) for name, weight in vae._weights.items()}
    check_tensors(path, WAN_VAE, shapes, hint, z=LATENT_CHANNELS)


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
