"""Choose the device, limit its memory, and explain when memory runs out."""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

from skyrun.errors import OutOfMemory, SkyrunError
from skyrun.kernels.machine.failures import is_out_of_memory, refused_allocations

_SPILLS = sys.platform == "win32" or "microsoft" in platform.release().lower()  # Windows' driver, under WSL too
_SPILL_SHARE = 0.01  # of the device's memory: with less of it free, Windows spills to RAM


# Torch's allocator reads these once, when CUDA starts. The second name is the one of torch before 2.9.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_outside: dict[torch.device, int] = {}  # bytes in use outside of torch when a measurement began


def join_free_memory() -> None:
    """Let torch's allocator join free memory of any sizes, unless the user has set the allocator up. Call it before
    CUDA starts.

    Without it memory that was freed in other sizes cannot be used for a large tensor, and plans that fit run out of
    memory. The driver of Windows does not support it.
    """
    if sys.platform == "win32" or any(name in os.environ for name in _ALLOCATOR):
        return
    old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9)
    os.environ[_ALLOCATOR[old]] = "expandable_segments:True"


def choose_device(name: str | None, devices: int = 1) -> torch.device:
    """The named device, which becomes this thread's own; without a name CUDA if torch finds a GPU, else the CPU.

    Raises SkyrunError if it is missing, or if there are fewer GPUs than `devices`.
    """
    if name != "cpu":
        join_free_memory()
    if name is not None and name != "cpu" and not torch.cuda.is_available():
        built = torch.version.cuda
        cause = f"torch {torch.__version__} finds no NVIDIA GPU" if built else f"torch {torch.__version__} has no CUDA"
        raise SkyrunError(f"--device {name}: {cause}", "run `skyrun doctor`, or use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = torch.device(name or "cuda").index, torch.cuda.device_count()
    if index is not None and index >= count:
        found = f"{count} GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
        raise SkyrunError(f"--device {name}: there is {found}", "run `skyrun doctor` to see them")
    if min(devices, devices_here(devices)) > count:
        hint = f"use --devices {count}, or start skyrun with torchrun on several machines (docs/devices.md)"
        raise SkyrunError(f"--devices {devices}: torch finds {count}", hint)
    # With an index, because other threads may have another default device.
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    use_device(device)
    return device


def devices_here(devices: int) -> int:
    """How many of the devices that make a clip are in this machine: all, if torch's launcher does not say otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", devices))


def use_device(device: torch.device) -> None:
    """Make the device this thread's own: CUDA calls of a new thread go to the first GPU, and take memory there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextmanager
def vram_limited(device: torch.device, nbytes: int) -> Iterator[None]:
    """Make torch's allocator fail instead of taking more than `nbytes`."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, nbytes) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def refuse_to_spill(device: torch.device) -> None:
    """Raise torch.OutOfMemoryError if Windows is about to move device memory to the host.

    Windows does not report a full GPU: if other programs take memory that this one counted on, its driver silently
    spills VRAM to RAM, and every step takes several times as long.
    """
    if device.type != "cuda" or not _SPILLS:
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < _SPILL_SHARE * total:
        left = f"{free >> 20} MiB of GPU memory are left"
        raise torch.OutOfMemoryError(f"{left}: other programs use it too, and Windows would spill to RAM")


def out_of_memory(error: BaseException, stage: str = "") -> OutOfMemory:
    """The SkyrunError for a failed allocation. stage: which it was in."""
    return OutOfMemory(str(error).splitlines()[0] if str(error) else "the system gave no more", stage)


@contextmanager
def out_of_memory_explained(stage: Callable[[], str] = str) -> Iterator[None]:
    """Turn a failed allocation into OutOfMemory. stage: says which it was in."""
    refused = refused_allocations()
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error, refused):
            raise
        raise out_of_memory(error, stage()) from error


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _outside[device] = _outside_torch(device)


def peak_bytes(device: torch.device) -> int:
    """Peak device memory in bytes since `reset_peak`; on a CPU the memory that the process uses now.

    It is what torch has reserved at most, used or not, and what is taken outside of torch now or was at the start: the
    CUDA context, libraries, and other programs.
    """
    if device.type == "cuda":
        outside = max(_outside_torch(device), _outside.get(device, 0))
        return int(torch.cuda.max_memory_reserved(device)) + outside
    return int(psutil.Process().memory_info().rss)


def _outside_torch(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(total - free - torch.cuda.memory_reserved(device)))


def finish(device: torch.device) -> None:
    """Wait for the device's work to finish, and release memory that is not in use."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
