"""What a device can do, and which kernels run on it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from statistics import median

import torch

from skyrun.kernels.machine.capability import FLOAT8, FLOAT16_SUMS, OLDEST
from skyrun.kernels.machine.failures import is_device_lost, is_out_of_memory
from skyrun.kernels.machine.toolchain import missing

_LAUNCHES = 5  # timed launches, after one that compiles and warms up


def uses_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on the device. The torch versions run elsewhere."""
    return device.type == "cuda" and not triton_problem(device)


@lru_cache
def triton_problem(device: torch.device) -> str:
    """Why the Triton kernels do not run on a GPU, and what to do about it; empty if they do.

    The first call launches a trivial kernel: a compiler that is there may still not work.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST:
        return f"the card has compute capability {major}.{minor}, Triton's kernels need {OLDEST[0]}.{OLDEST[1]}"
    try:
        from skyrun.kernels.triton import probe as triton_probe

        triton_probe.launch(device)
    except Exception as error:  # compilers raise all kinds of errors
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        cause = str(error).partition("\n")[0]
        return str(missing() or f"Triton's kernels do not run here: {cause}; `pip install -U triton` may help")
    return ""


@lru_cache
def device_name(device: torch.device) -> str:
    """The name of the graphics card, or the device type if it is not a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def driver_version(device: torch.device) -> str:
    """The newest CUDA that the GPU's driver supports, such as "12080"; empty for a CPU."""
    if device.type != "cuda":
        return ""
    return str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined] # only builds with CUDA have it


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
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in FLOAT16_SUMS


@lru_cache
def has_float8(device: torch.device) -> bool:
    """Whether tensor cores multiply float8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLOAT8


@lru_cache
def sums_in_tensor_memory(device: torch.device) -> bool:
    """Whether tensor cores keep sums in a memory of their own, as those of the B200 do, and not in registers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
