"""What a device can do, and which kernels run on it. The only file of kernels/ that calls CUDA."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from statistics import median

import torch

_OLDEST = (8, 0)  # compute capability that Triton needs, and the first with tensor cores for bfloat16 and int8
_GEFORCE = ((8, 6), (8, 9), (12, 0))  # compute capabilities of the RTX 3000, 4000 and 5000 series
_LAUNCHES = 5  # timed launches, after one that compiles and warms up


@lru_cache
def uses_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on the device. The torch versions run elsewhere."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _OLDEST


def refused_allocations() -> int:
    """How many allocations torch has refused on GPUs so far, including those where a library went on without."""
    return sum(torch.cuda.memory_stats(index).get("num_ooms", 0) for index in _used_gpus())


def free_device_bytes() -> float:
    """Bytes that are free on the fullest GPU that this process uses; infinite without one."""
    return min((torch.cuda.mem_get_info(index)[0] for index in _used_gpus()), default=float("inf"))


def _used_gpus() -> list[int]:
    if not torch.cuda.is_initialized():
        return []
    return [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_stats(index)]


@lru_cache
def device_name(device: torch.device) -> str:
    """The name of the graphics card, or the device type if it is not a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def driver_version(device: torch.device) -> str:
    """The newest CUDA that the GPU's driver supports, such as "12080"; empty for a CPU."""
    return str(torch._C._cuda_getDriverVersion()) if device.type == "cuda" else ""


def median_seconds(
    device: torch.device,
    work: Callable[[], object],
    launches: int = _LAUNCHES,
    before: Callable[[], object] = lambda: None,
) -> float:
    """The median time that `work` takes on the device, after one launch that warms up.

    Args:
        device: where `work` runs; CUDA work is timed with events.
        work: what is timed.
        launches: how many times it is timed.
        before: runs before each launch and is not timed.
    """
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
    """Let float16 matmuls accumulate in float16, which doubles their speed on GeForce cards."""
    backend = torch.backends.cuda.matmul
    before = backend.allow_fp16_accumulation
    backend.allow_fp16_accumulation = True
    try:
        yield
    finally:
        backend.allow_fp16_accumulation = before


@lru_cache
def float16_sums_are_quick(device: torch.device) -> bool:
    """Whether tensor cores accumulate in float16 at twice the rate of float32, as those of GeForce cards do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _GEFORCE
