"""Measure the disk, the link, and the compute rates of this device at the sizes of the real models, and save them."""

import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.events import Event, Progress, StageEnded, StageStarted, now
from skyrun.kernels import linear
from skyrun.kernels.attention import Keys, attend, quick_precisions
from skyrun.kernels.machine.device import median_seconds, uses_triton
from skyrun.models.dit_header import HEAD_DIM
from skyrun.planning.hardware import Tuned, disk_number, save_tuned, this_machine
from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request
from skyrun.presets import Hardware
from skyrun.presets.machine.cards import Rates
from skyrun.presets.machine.hardware import measure_link
from skyrun.presets.machine.host import disk_rate
from skyrun.presets.timing import rates_of
from skyrun.streaming.device import choose_device, peak_bytes
from skyrun.tasks.skyreels_v3 import REFERENCE_TO_VIDEO, WAN_14B
from skyrun.tools.bench.synthetic_weight import random_weight

_STAGE = "tune"
_CLIP = Request(REFERENCE_TO_VIDEO.name, "")  # its predicted time is compared before and after
_DIM, _FFN = WAN_14B["dim"], WAN_14B["ffn"]
_FILE_BYTES = 256 << 20  # of the file that a disk is measured with if there is no model
_LAUNCHES = 3
# The autoencoder as a whole reaches this share of the rate of its widest convolution (docs/presets.md). Norms, copies
# and narrow layers take the rest of the time.
_REACHED = 0.75


@dataclass(frozen=True)
class _Sizes:
    """Rows of a matmul; queries, keys and heads of attention; channels, height and width of a convolution."""

    rows: int
    queries: int
    keys: int
    heads: int
    channels: int
    height: int
    width: int


_SIZES = {"cuda": _Sizes(8192, 4096, 16384, 40, 192, 240, 424), "cpu": _Sizes(1024, 512, 8192, 8, 96, 60, 104)}
_ATTENTION = {"int8": "int8_attention", "full-int8": "full_int8_attention", "fp8": "fp8_attention"}
STEPS = ("disk", "link", "decode", "linear", "attention", "fast_linear", *_ATTENTION.values(), "convolution", "float32")


@dataclass(frozen=True)
class Tuning:
    """What tuning has changed.

    file: where the rates are saved. measured: rates by the names of STEPS, bytes or operations per second; 0 for what
    this machine does not have. before, after: the machine as plans saw it before and see it now. seconds_before,
    seconds_after: of a clip with the published model.
    """

    file: Path
    measured: dict[str, float]
    before: Hardware
    after: Hardware
    seconds_before: float
    seconds_after: float

    def rate_before(self, name: str) -> float:
        """The rate that plans used before."""
        return _rate(self.before, name)

    def rate_after(self, name: str) -> float:
        """The rate that plans use now."""
        return _rate(self.after, name)

    def origin_before(self, name: str) -> str:
        """The origin of the rate that plans used before."""
        return self.before.origin("rates" if name in Rates.__dataclass_fields__ else f"{name}_rate")

    def as_json(self) -> dict[str, Any]:
        """Plain values of the measured rates."""
        rates = {
            name: {"before": self.rate_before(name), "origin": self.origin_before(name), "now": self.rate_after(name)}
            for name in STEPS
            if self.measured[name]
        }
        seconds = {"before": self.seconds_before, "now": self.seconds_after}
        return {"file": str(self.file), "rates": rates, "seconds": seconds}


def tune_machine(device_name: str | None, model: Path | None = None) -> Generator[Event, None, Tuning]:
    """Measure everything and save it for plans.

    model: a file or folder whose disk is measured instead of that of the current folder.
    """
    device = choose_device(device_name)
    before, start = this_machine(device.type, model), now()
    measured: dict[str, float] = {}
    yield StageStarted(_STAGE, len(STEPS), "figures")
    for name, rate in _measure(device, model):
        measured[name] = rate
        yield Progress(_STAGE, len(measured))
    yield StageEnded(_STAGE, now() - start, peak_bytes(device))
    rates = Rates(**{name: measured[name] for name in Rates.__dataclass_fields__})
    disks = {disk_number(model): measured["disk"]} if measured["disk"] else {}
    file = save_tuned(device.type, Tuned(rates, measured["link"], disks))
    after = this_machine(device.type, model)
    seconds = (plan_request(_CLIP, hardware).plan.seconds for hardware in (before, after))
    return Tuning(file, measured, before, after, *seconds)


def _rate(hardware: Hardware, name: str) -> float:
    if name in Rates.__dataclass_fields__:
        return float(getattr(rates_of(hardware), name))
    return hardware.disk_rate if name == "disk" else hardware.link_rate


@torch.inference_mode()
def _measure(device: torch.device, model: Path | None) -> Iterator[tuple[str, float]]:
    """Yield the name and rate of each of STEPS."""
    cuda, sizes = device.type == "cuda", _SIZES[device.type]
    dtype = torch.bfloat16 if cuda else torch.float32
    yield "disk", _disk(model)
    yield "link", measure_link() if cuda else 0.0
    weight = random_weight("Q8_0", _FFN, _DIM, device)
    seconds = median_seconds(device, lambda: weight.dense(dtype), _LAUNCHES)
    yield "decode", (weight.data.nbytes + _FFN * _DIM * dtype.itemsize) / seconds
    yield "linear", _linear(device, dtype, sizes, fast=False)
    yield "attention", _attention(device, dtype, sizes, "exact")
    yield "fast_linear", _linear(device, dtype, sizes, fast=True) if uses_triton(device) else 0.0
    there = quick_precisions(device)
    for precision, name in _ATTENTION.items():
        yield name, _attention(device, dtype, sizes, precision) if precision in there else 0.0
    yield "convolution", _convolution(device, dtype, sizes)
    yield "float32", _convolution(device, torch.float32, sizes) if cuda else 0.0


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
    """Operations per second of matmuls with the two shapes of the feed-forward.

    On a GPU the rows of a clip hide the time for decoding. On a CPU the fewer rows here do not, so weights are decoded
    in advance.
    """
    seconds = 0.0
    for out, cols in ((_FFN, _DIM), (_DIM, _FFN)):
        x, blocks = _random(device, dtype, sizes.rows, cols), random_weight("Q8_0", out, cols, device, fast=fast)
        weight = blocks if device.type == "cuda" else blocks.dense(dtype)
        seconds += median_seconds(device, partial(linear, x, weight), _LAUNCHES)
    return 4 * sizes.rows * _FFN * _DIM / seconds


def _attention(device: torch.device, dtype: torch.dtype, sizes: _Sizes, precision: str) -> float:
    width = sizes.heads * HEAD_DIM
    q, k, v = (_random(device, dtype, rows, width) for rows in (sizes.queries, sizes.keys, sizes.keys))
    keys = Keys(k, v, sizes.heads, precision)
    return 4 * sizes.queries * sizes.keys * width / median_seconds(device, partial(attend, q, keys), _LAUNCHES)


def _convolution(device: torch.device, dtype: torch.dtype, sizes: _Sizes) -> float:
    """The autoencoder's rate, from its widest convolution: over four frames and the two before them."""
    channels, frames = sizes.channels, 4
    shapes = (1, channels, frames + 2, sizes.height, sizes.width), (channels, channels, 3, 3, 3)
    x, weight = (_random(device, dtype, *s).contiguous(memory_format=torch.channels_last_3d) for s in shapes)
    work = partial(F.conv3d, x, weight, padding=(0, 1, 1))
    operations = 2 * 27 * channels**2 * frames * sizes.height * sizes.width
    return _REACHED * operations / median_seconds(device, work, _LAUNCHES)


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)
