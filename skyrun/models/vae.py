"""The Wan VAE: encodes pixels to latents, eight times smaller in space and four times in time, and decodes them.

Encoder and decoder process frames in groups and keep the last input frames of each convolution, so memory does not grow
with the length of the clip. Within a group convolutions can be computed slab by slab, and what is kept can wait on the
host; neither changes the result. A slab is computed from its own rows and the neighbouring rows that the convolution
depends on, so the slabs join exactly: nothing is blended and there are no seams. Weights have original Wan names, from
which the structure is derived.

Frames are [T, H, W, C]: channels last is what convolutions are quickest with, on GPUs and on CPUs.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.kernels import elementwise
from skyrun.kernels.files.fitting import check_tensors
from skyrun.kernels.files.safetensors_header import SafetensorsHeader, own_words, read_safetensors_header
from skyrun.kernels.name_tables import WAN_VAE
from skyrun.models.slabs import Slab, Tile, by_slab, cut
from skyrun.models.vae_memory import Memory
from skyrun.parallel.group import Group
from skyrun.parallel.rows import SharedRows

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
_EPS = 1e-24  # of a mean square: rows of zeros stay zeros
# Doubling space repeats every row and column before a convolution of 3 x 3. The even and the odd rows of the result
# depend on two rows of the input each, through these sums of the kernel's rows; columns likewise.
_EVEN_ODD = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


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
        group: Group | None = None,
    ) -> None:
        self._group = group or Group()
        self._rows = SharedRows(self._group, 1)
        self._path, self._device, self._dtype, self._tile, self._room = path, device, dtype, tile, room
        self._weights, metadata = _load(path, device, dtype)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
            for values in _statistics(path, metadata)
        )

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels [3, T, H, W] in [-1, 1] -> mean and log-variance, float32 [16, 1 + (T-1)//4, H/8, W/8] each.

        These are not normalised. Frames after the last whole group of four are dropped.
        """
        return self.encode_groups(video[:, group] for group in groups_of(video.shape[1]))

    def encode_groups(self, groups: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """As `encode`, for a video in groups: [3, 1, H, W] first, then [3, 4, H, W] each."""
        encoded = []
        with closing(Memory(self._device, self._room)) as memory:
            for group, last in _with_last(groups):
                memory.last_group = last
                frames = group.to(self._device, self._dtype).movedim(0, 3).contiguous()
                encoded.append(self._linear(self._encoder(frames, memory), "conv1"))
                memory.first_group = False
        mean, log_variance = torch.cat(encoded).movedim(3, 0).float().chunk(2)
        return mean, log_variance.clamp(-30, 20)

    def normalise(self, latents: Tensor) -> Tensor:
        """Normalise raw latents [16, F, h, w]."""
        return (latents - self._mean) / self._std

    def sample(self, video: Tensor, noise: Tensor) -> Tensor:
        """Sample normalised latents from the posterior of pixels [3, T, H, W] with noise [16, F, h, w]."""
        mean, log_variance = self.encode(video)
        return self.normalise(mean + torch.exp(0.5 * log_variance) * noise.to(self._device))

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode normalised latents [16, F, h, w] and yield pixels in [-1, 1]: [3, 1, H, W], then [3, 4, H, W] each.

        The devices of a group, each of which calls this, have a range of rows each; only rank 0 gets the pixels.
        """
        self._rows = SharedRows(self._group, latents.shape[2])
        latents = latents[:, :, self._rows.own]
        raw = (latents.to(self._device, torch.float32) * self._std + self._mean).to(self._dtype)
        with closing(Memory(self._device, self._room)) as memory:
            for frame, last in _with_last(raw.movedim(0, 3).contiguous().split(1)):
                memory.last_group = last
                own = self._decoder(self._linear(frame, "conv2"), memory)
                yield self._rows.whole(own, to=0).movedim(3, 0).float().clamp_(-1, 1)
                del own
                memory.first_group = False

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

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """A convolution that sees one pixel: a linear layer over channels."""
        return F.linear(x, self._w(f"{name}.weight").flatten(1), self._w(f"{name}.bias"))

    def _conv(
        self, x: Tensor, name: str, memory: Memory, norm: str | None = None, onto: Tensor | None = None
    ) -> Tensor:
        """A causal convolution over time. Earlier frames come from memory; before the first frame there are zeros.

        norm: name of a norm that is applied to x first, followed by SiLU. onto: a tensor that the result is added to.
        """
        weight, bias = self._w(f"{name}.weight"), self._w(f"{name}.bias")
        before, margin = weight.shape[2] - 1, weight.shape[3] // 2
        there, above, below = self._rows.lent(x, margin)

        def compute(index: int, slab: Slab) -> Tensor:
            part = self._after_past(there[:, slab.reach], before, memory, name, index, norm)
            if len(part) == 1:  # the first frame: the other taps would see zeros
                return _convolved_2d(part, weight[:, :, -1], bias, padding=margin)[:, slab.inside]
            return _convolved(part, weight, bias, padding=(0, margin, margin))[:, slab.inside]

        return by_slab(cut(x.shape[1], x.shape[2], self._tile, margin, above, below), compute, onto=onto)

    def _after_past(self, x: Tensor, before: int, memory: Memory, layer: str, slab: int, norm: str | None) -> Tensor:
        """Join `before` past frames and x, to which a norm and SiLU are applied if `norm` names one, in one pass.

        Before a single frame without a past there are no zeros. The last frames are kept for the next group.
        """
        alone = len(x) == 1 and not memory.holds(layer, slab)
        past = 0 if alone else before
        joined = x.new_empty(past + len(x), *x.shape[1:])
        if memory.holds(layer, slab):
            memory.recall(joined[:past], layer, slab)
        else:
            joined[:past].zero_()
        if norm is None:
            joined[past:].copy_(x)
        else:
            elementwise.norm_silu(x, self._w(f"{norm}.gamma"), _EPS, joined[past:])
        last = F.pad(joined, (0, 0) * 3 + (before - 1, 0)) if alone and not memory.last_group else joined
        memory.keep(last[-before:], layer, slab)
        return joined

    def _residual(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """A residual block of two convolutions. Without a shortcut the sum is computed in place, in x."""
        h = self._conv(x, f"{name}.residual.2", memory, norm=f"{name}.residual.0")
        if f"{name}.shortcut.weight" in self._weights:
            x = self._linear(x, f"{name}.shortcut")
        return self._conv(h, f"{name}.residual.6", memory, norm=f"{name}.residual.3", onto=x)

    def _middle(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        x = self._residual(x, f"{name}.0", memory)
        x += self._attention(x, f"{name}.1")
        return self._residual(x, f"{name}.2", memory)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        """Attention with one head over the pixels of each frame."""
        normed = elementwise.rms_norm(x.flatten(0, 2), self._w(f"{name}.norm.gamma"), _EPS)
        q, *parts = self._linear(normed.view_as(x), f"{name}.to_qkv").chunk(3, 3)
        q, k, v = (part.flatten(1, 2).unsqueeze(1).contiguous() for part in (q, *map(self._rows.whole, parts)))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self._linear(mixed.reshape(x.shape), f"{name}.proj")

    def _tail(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        return self._conv(x, f"{name}.2", memory, norm=f"{name}.0")

    def _spatial(self, x: Tensor, name: str, **settings: Any) -> Tensor:
        """The 2-D convolution of a resampler."""
        weight, bias = self._w(f"{name}.resample.1.weight"), self._w(f"{name}.resample.1.bias")
        return _convolved_2d(x, weight, bias, **settings)

    def _downsample(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """Halve space, then time, with the last frame of the group before. Time is not halved in the first group."""
        x = self._halve(x, name)
        if f"{name}.time_conv.weight" not in self._weights:
            return x
        if memory.first_group:
            memory.keep(x[-1:], name)
            return x
        joined = self._after_past(x, 1, memory, name, 0, None)
        weight, bias = self._w(f"{name}.time_conv.weight"), self._w(f"{name}.time_conv.bias")
        return _convolved(joined, weight, bias, stride=(2, 1, 1))

    def _halve(self, x: Tensor, name: str) -> Tensor:
        """Halve space: row i depends on rows 2i to 2i + 2, columns likewise, with zeros after the last."""
        height = x.shape[1]

        def compute(_: int, slab: Slab) -> Tensor:
            first, last = 2 * slab.rows.start, 2 * slab.rows.stop + 1
            return self._spatial(F.pad(x[:, first:last], (0, 0, 0, 1, 0, max(0, last - height))), name, stride=2)

        return by_slab(cut(height // 2, 2 * x.shape[2], self._tile, 0), compute)

    def _upsample(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """Double time, except for the first frame, then double space.

        The time convolution does not see the first frame: before the second group there are zeros.
        """
        if f"{name}.time_conv.weight" in self._weights and not memory.first_group:
            even_odd = self._conv(x, f"{name}.time_conv", memory).unflatten(3, (2, -1))
            x = even_odd.movedim(3, 1).flatten(0, 1).contiguous()
        return self._double(x, name)

    def _double(self, x: Tensor, name: str) -> Tensor:
        """Double space by repeating every pixel four times, followed by a convolution: both at once.

        One convolution of 2 x 2 gives the four pixels that a pixel becomes, in their places from one row and column to
        the next: less than half the operations, and nothing is repeated in memory.
        """
        there, above, below = self._rows.lent(x, 1)

        def compute(_: int, slab: Slab) -> Tensor:
            part, (start, stop) = there[:, slab.reach], (slab.inside.start, slab.inside.stop)
            four = self._spatial(part, name, padding=1).unflatten(3, (2, 2, -1))
            out: Tensor = four.new_empty(len(x), stop - start, 2, x.shape[2], 2, four.shape[5])
            for odd_row in (0, 1):
                for odd_col in (0, 1):
                    rows, cols = slice(start + odd_row, stop + odd_row), slice(odd_col, x.shape[2] + odd_col)
                    out[:, :, odd_row, :, odd_col] = four[:, rows, cols, odd_row, odd_col]
            doubled: Tensor = out.flatten(3, 4).flatten(1, 2)
            return doubled

        return by_slab(cut(x.shape[1], 4 * x.shape[2], self._tile, 1, above, below), compute, scale=2)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor, **settings: Any) -> Tensor:
    """A 3-D convolution of frames."""
    out = F.conv3d(x.unsqueeze(0).permute(0, 4, 1, 2, 3), weight, bias, **settings)
    return _channels_last(out.permute(0, 2, 3, 4, 1).squeeze(0))


def _convolved_2d(x: Tensor, weight: Tensor, bias: Tensor, **settings: Any) -> Tensor:
    """A 2-D convolution of each frame."""
    return _channels_last(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, **settings).permute(0, 2, 3, 1))


def _channels_last(frames: Tensor) -> Tensor:
    """What a convolution gave, which has channels last but where a CPU computes a small one."""
    return frames.contiguous() if frames.device.type == "cpu" else frames


def _prepared(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it is used: convolutions have channels last, norms stay float32."""
    if name.endswith(".gamma"):
        return weight.flatten().float()
    doubles = name.startswith("decoder.upsamples.")
    if doubles and name.endswith(".resample.1.weight"):
        sums = torch.tensor(_EVEN_ODD, dtype=torch.float32, device=weight.device)
        weight = torch.einsum("yau,xbv,oiuv->yxoiab", sums, sums, weight.float()).flatten(0, 2)
    if doubles and name.endswith(".resample.1.bias"):
        weight = weight.repeat(4)
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim, torch.contiguous_format)
    return weight.to(dtype).contiguous(memory_format=layout)


def _with_last(groups: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each group, and whether it is the last."""
    groups = iter(groups)
    group = next(groups, None)
    while group is not None:
        after = next(groups, None)
        yield group, after is None
        group = after


def groups_of(frames: int) -> list[slice]:
    """The groups that the VAE encodes at a time: the first frame, then whole groups of four frames."""
    return [slice(0, 1), *(slice(start, start + _GROUP) for start in range(1, frames - _GROUP + 1, _GROUP))]


def vae_channels(base: int) -> tuple[int, ...]:
    """How many channels frames have at full resolution, at half of it, and at a quarter and less."""
    return base, 2 * base, 4 * base


def read_vae_dims(path: Path) -> tuple[int, int]:
    """The channels of the VAE at full resolution and the number of its weights, from the file's header."""
    tensors = read_safetensors_header(path).tensors
    head = tensors.get("decoder.head.2.weight")
    if head is None or len(head.shape) != 5:
        raise SkyrunError(f"{path} is not a Wan autoencoder with original names", "convert the published checkpoint")
    return head.shape[1], sum(prod(tensor.shape) for tensor in tensors.values())


def check_vae(path: Path) -> None:
    """Raise SkyrunError if a tensor is missing or does not fit the others, or if the statistics cannot be."""
    hint, header = "convert or download the autoencoder again", _header(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}
    check_tensors(path, WAN_VAE, shapes, hint, z=LATENT_CHANNELS)
    try:
        _statistics(path, header.metadata)
    except ValueError as error:
        raise SkyrunError(f"{path} has metadata that is not JSON: {error}", hint) from error


def _statistics(path: Path, metadata: dict[str, str]) -> list[Sequence[float]]:
    """The mean of each channel of the latents, then their standard deviations, as the file or else Wan has them."""
    said, found = own_words(metadata), []
    for key, default in (("latents_mean", _LATENTS_MEAN), ("latents_std", _LATENTS_STD)):
        values = said.get(key, default)
        numbers = isinstance(values, (list, tuple)) and [
            value for value in values if isinstance(value, (int, float)) and abs(value) < _LARGEST
        ]
        if not numbers or len(numbers) != len(values) or len(values) != LATENT_CHANNELS:
            raise SkyrunError(f"{path} says {key} = {values}, expected {LATENT_CHANNELS} numbers", "convert it again")
        found.append(values)
    return found


def _header(path: Path) -> SafetensorsHeader:
    header = read_safetensors_header(path)
    strange = [
        f"{name} is {t.dtype}, expected F32, F16 or BF16" for name, t in header.tensors.items() if t.dtype not in _FLOAT
    ]
    if strange:
        raise SkyrunError.listing(f"{path} cannot be used", strange, "convert or download the autoencoder again")
    return header


def _load(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    if device.type == "meta":
        header = _header(path)
        empty = {name: torch.empty(tensor.shape, device=device) for name, tensor in header.tensors.items()}
        return {name: _prepared(name, weight, dtype) for name, weight in empty.items()}, header.metadata
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()
            weights = {name: _prepared(name, file.get_tensor(name).to(device), dtype) for name in names}
            return weights, file.metadata() or {}
    except FileNotFoundError as error:
        raise SkyrunError(f"{path} does not exist", "check the path", MODEL_MISSING) from error
    except (SafetensorError, OSError) as error:
        raise SkyrunError(f"cannot read {path}: {error}", "convert or download it again") from error
