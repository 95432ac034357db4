"""`skyrun tune`: measure the disk, the link, and how quickly this device computes, at the sizes of the real models."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels import linear
from skyrun.kernels.attention import Keys, attend
from skyrun.kernels.device import median_seconds, uses_triton
from skyrun.kernels.synthetic import random_weight
from skyrun.planning.hardware import Tuned, disk_number, load_tuned
from skyrun.presets.cards import Rates
from skyrun.presets.hardware import measure_link
from skyrun.presets.host import disk_rate

_DIM, _FFN = 5120, 13824
_FILE_BYTES = 256 << 20  # of the file that a disk is measured with where there is no model
_LAUNCHES = 3


# Of its widest convolution's rate the autoencoder as a whole reaches so much, by docs/presets.md; norms, copies and
# narrow levels take the rest.
_REACHED = 0.75


@dataclass(frozen=True)
class _Sizes:
    """Rows of a product; queries, keys and heads of attention; channels, height and width of a convolution."""

    rows: int
    queries: int
    keys: int
    heads: int
    channels: int
    height: int
    width: int


_SIZES = {"cuda": _Sizes(8192, 4096, 16384, 40, 192, 240, 424), "cpu": _Sizes(1024, 512, 8192, 8, 96, 60, 104)}
STEPS = ("disk", "link", "decode", "linear", "attention", "fast_linear", "fast_attention", "convolution")


@torch.inference_mode()
def tune(device: torch.device, model: Path | None = None) -> Iterator[tuple[str, float]]:
    """Name and rate of each of STEPS, one after the other: bytes or operations per second, 0 for what is not here.

    model: a large file; its disk is measured instead of the current folder's.
    """
    cuda, sizes = device.type == "cuda", _SIZES[device.type]
    dtype = torch.bfloat16 if cuda else torch.float32
    yield "disk", _disk(model)
    yield "link", measure_link() if cuda else 0.0
    weight = random_weight("Q8_0", _FFN, _DIM, device)
    seconds = median_seconds(device, lambda: weight.dense(dtype), _LAUNCHES)
    yield "decode", (weight.data.nbytes + _FFN * _DIM * dtype.itemsize) / seconds
    yield "linear", _linear(device, dtype, sizes, fast=False)
    yield "attention", _attention(device, dtype, sizes, fast=False)
    triton = uses_triton(device)
    yield "fast_linear", _linear(device, dtype, sizes, fast=True) if triton else 0.0
    yield "fast_attention", _attention(device, dtype, sizes, fast=True) if triton else 0.0
    yield "convolution", _convolution(device, dtype, sizes)


def tuned(device: torch.device, model: Path | None, rates: dict[str, float]) -> Tuned:
    """What `tune` found, beside what is known of other disks."""
    before = load_tuned(device.type)
    disks = (before.disks if before else {}) | ({disk_number(model): rates["disk"]} if rates["disk"] else {})
    speeds = {name: rates[name] for name in Rates.__dataclass_fields__}
    return Tuned(Rates(**speeds), rates["link"], disks)


def _disk(model: Path | None) -> float:
    if model is not None and model.is_file() and (rate := disk_rate(model)):
        return rate
    folder = Path.cwd() if model is None else model if model.is_dir() else model.parent
    with TemporaryDirectory(prefix="skyrun-tune-", dir=folder) as place:
        path = Path(place) / "file"
        with path.open("wb") as file:
            for _ in range(_FILE_BYTES >> 24):
                file.write(os.urandom(1 << 24))
            file.flush()
            os.fsync(file.fileno())
        return disk_rate(path)


def _linear(device: torch.device, dtype: torch.dtype, sizes: _Sizes, fast: bool) -> float:
    """Operations per second of products with the two shapes of the feed-forward.

    On a GPU a clip's rows hide what decoding takes; on a CPU the fewer rows here do not, so weights are decoded before.
    """
    seconds = 0.0
    for out, cols in ((_FFN, _DIM), (_DIM, _FFN)):
        x, blocks = _random(device, dtype, sizes.rows, cols), random_weight("Q8_0", out, cols, device, fast=fast)
        weight = blocks if device.type == "cuda" else blocks.dense(dtype)
        seconds += median_seconds(device, partial(linear, x, weight), _LAUNCHES)
    return 4 * sizes.rows * _FFN * _DIM / seconds


def _attention(device: torch.device, dtype: torch.dtype, sizes: _Sizes, fast: bool) -> float:
    width = sizes.heads * 128
    q, k, v = (_random(device, dtype, rows, width) for rows in (sizes.queries, sizes.keys, sizes.keys))
    keys = Keys(k, v, sizes.heads, fast)
    return 4 * sizes.queries * sizes.keys * width / median_seconds(device, partial(attend, q, keys), _LAUNCHES)


def _convolution(device: torch.device, dtype: torch.dtype, sizes: _Sizes) -> float:
    """The autoencoder's, by its widest: that over four frames and two before them."""
    channels, frames = sizes.channels, 4
    x = _random(device, dtype, 1, channels, frames + 2, sizes.height, sizes.width)
    weight = _random(device, dtype, channels, channels, 3, 3, 3)
    work = partial(F.conv3d, x, weight, padding=(0, 1, 1))
    operations = 2 * 27 * channels**2 * frames * sizes.height * sizes.width
    return _REACHED * operations / median_seconds(device, work, _LAUNCHES)


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)
