"""What a device can do, and which kernels run on it. The only file of the kernels that talks to CUDA."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from statistics import median

import torch

_OLDEST = (8, 0)  # compute capability: Triton's own limit, and the first with tensor cores for bfloat16 and int8
_GEFORCE = ((8, 6), (8, 9), (12, 0))  # compute capabilities of the RTX 3000, 4000 and 5000 series
_LAUNCHES = 5  # of a measurement, after one that compiles and warms up


@lru_cache
def uses_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on the device; torch stands in for them elsewhere."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _OLDEST


@lru_cache
def device_name(device: torch.device) -> str:
    """The name of the graphics card, or of the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def median_seconds(
    device: torch.device,
    work: Callable[[], object],
    launches: int = _LAUNCHES,
    before: Callable[[], object] = lambda: None,
) -> float:
    """The median time that `work` takes on the device. before: runs ahead of each, untimed."""
    work()
    if device.type != "cuda":
        return median(_host_seconds(work, before) for _ in range(launches))
    marks = []
    for _ in range(launches):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        work()
        end.record(torch.cuda.current_stream(device))
        marks.append((start, end))
    torch.cuda.synchronize(device)
    return float(median(start.elapsed_time(end) for start, end in marks)) / 1e3


def _host_seconds(work: Callable[[], object], before: Callable[[], object]) -> float:
    before()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def float16_accumulation() -> Iterator[None]:
    """Let products of float16 matrices add up in float16: twice the speed on GeForce cards."""
    backend = torch.backends.cuda.matmul
    before = backend.allow_fp16_accumulation
    backend.allow_fp16_accumulation = True
    try:
        yield
    finally:
        backend.allow_fp16_accumulation = before


@lru_cache
def float16_sums_are_quick(device: torch.device) -> bool:
    """Whether tensor cores add float16 products up in float16 at twice the rate of float32: GeForce cards' do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _GEFORCE
