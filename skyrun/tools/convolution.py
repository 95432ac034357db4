"""Measure one 3-D convolution of the autoencoder beside the 2-D convolutions that it is the sum of.

Some versions of torch and cuDNN compute 3-D convolutions slowly, in a buffer many times as large as the result, or
wrongly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.machine.device import median_seconds
from skyrun.streaming.device import choose_device

_CHANNELS, _FRAMES = 96, 4  # of the widest frames
_SIZES = {"cuda": (240, 424), "cpu": (48, 64)}
_LAUNCHES = 3


@dataclass(frozen=True)
class Convolution:
    """seconds, apart_seconds: of the 3-D convolution, and of the 2-D ones. error: of its result against theirs, in
    units of their norm. buffer: bytes that a GPU takes besides the result, 0 if not known. result: bytes of that.
    """

    device: str
    dtype: str
    seconds: float
    apart_seconds: float
    error: float
    buffer: int
    result: int


@torch.inference_mode()
def measure_convolution(device_name: str | None = None, size: tuple[int, int] | None = None) -> Convolution:
    """Measure on a device; None chooses the GPU if there is one."""
    device = choose_device(device_name)
    cuda = device.type == "cuda"
    dtype = torch.float32
    if cuda:
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    generator = torch.Generator().manual_seed(0)
    shapes = (1, _CHANNELS, _FRAMES + 2, *(size or _SIZES[device.type])), (_CHANNELS, _CHANNELS, 3, 3, 3)
    x, weight = (
        torch.randn(shape, generator=generator).to(device, dtype, memory_format=torch.channels_last_3d)
        for shape in shapes
    )

    def together() -> Tensor:
        return F.conv3d(x, weight, padding=(0, 1, 1))

    def apart() -> Tensor:
        frames = x.squeeze(0).transpose(0, 1)
        taps = [F.conv2d(frames[tap : tap + _FRAMES], weight[:, :, tap], padding=1) for tap in range(3)]
        return torch.stack(taps).float().sum(0).transpose(0, 1).unsqueeze(0)

    expected, result, buffer = apart(), together().float(), _buffer(device, together)
    error = float((result - expected).norm() / expected.norm())
    seconds, apart_seconds = (median_seconds(device, work, _LAUNCHES) for work in (together, apart))
    name = str(dtype).removeprefix("torch.")
    return Convolution(device.type, name, seconds, apart_seconds, error, buffer, result.numel() * dtype.itemsize)


def _buffer(device: torch.device, work: Callable[[], Tensor]) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    nbytes = work().nbytes
    return max(0, torch.cuda.max_memory_allocated(device) - before - nbytes)
