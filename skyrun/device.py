"""The device: which one, what it holds, and rings of buffers that hand blocks of weights to it.

The only file of the runner that talks to CUDA.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from skyrun.errors import FAILED, SkyrunError

_BLOCKS_AHEAD = 2
# Failed allocations that torch reports as a plain RuntimeError.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA where torch finds one, or the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        cause = f"torch {torch.__version__} finds no NVIDIA GPU" if built else f"torch {torch.__version__} has no CUDA"
        raise SkyrunError(f"--device cuda: {cause}", "run `skyrun doctor`, or use --device cpu")
    if (name or "cuda") == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # with its index: other threads have another default
    return torch.device("cpu")


@contextmanager
def vram_limited(device: torch.device, nbytes: int) -> Iterator[None]:
    """Let torch's allocator fail above `nbytes` rather than take more."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, nbytes) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Turn a failed allocation, on the device or the host, into a SkyrunError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        cause = str(error).splitlines()[0] if str(error) else "the system gave no more"
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(sign in cause for sign in _OUT_OF_MEMORY):
            raise
        hint = "use a smaller --resolution or --size or fewer --seconds, or close other programs"
        raise SkyrunError(f"out of memory: {cause}", hint, FAILED) from error


def reset_peak(device: torch.device) -> None:
    """Start measuring `peak_bytes` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Bytes of device memory at their highest since `reset_peak`; on a CPU the memory of the process now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def finish(device: torch.device) -> None:
    """Wait for the device's work, and give memory that is not in use back to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


class Ring(Protocol):
    """A fixed number of equal buffers on a device, filled in turn by a reader thread, used in turn by a model."""

    slots: list[Tensor]

    def host(self, slot: int) -> Tensor:
        """Reader: the host memory to read into for this slot."""

    def send(self, slot: int, nbytes: int) -> None:
        """Reader: the first `nbytes` of the host memory are complete; bring them to the slot."""

    def receive(self, slot: int) -> None:
        """Model: work enqueued from here on sees the slot filled."""

    def release(self, slot: int) -> None:
        """Model: work enqueued so far is the last that uses the slot."""

    def keep_pace(self) -> None:
        """Model: a block is enqueued. Wait until the device is at most two behind, so that times mean something."""

    def close(self) -> None:
        """Let go of the buffers, once no copy into them is under way."""


class HostRing:
    """On a CPU a slot is the memory that is read into."""

    def __init__(self, slots: int, nbytes: int) -> None:
        self.slots = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(slots)]

    def host(self, slot: int) -> Tensor:
        return self.slots[slot]

    def send(self, slot: int, nbytes: int) -> None:
        pass

    def receive(self, slot: int) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def keep_pace(self) -> None:
        pass

    def close(self) -> None:
        self.slots.clear()


class CudaRing:
    """Slots in device memory behind two page-locked buffers: one is read into while the other is copied.

    Copies run on their own stream, and events order them with the model's kernels.
    """

    def __init__(self, device: torch.device, slots: int, nbytes: int) -> None:
        self.slots = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._staging = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2 if slots else 0)]
        self._staged: list[Any] = [None, None]
        self._turn = 0
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._copies.wait_stream(torch.cuda.current_stream(device))  # the slots' memory may still be in use there
        self._enqueued: deque[Any] = deque()
        self._filled = [torch.cuda.Event() for _ in range(slots)]
        self._released: list[Any] = [None] * slots

    def host(self, slot: int) -> Tensor:
        self._turn ^= 1
        if self._staged[self._turn] is not None:
            self._staged[self._turn].synchronize()
        return self._staging[self._turn]

    def send(self, slot: int, nbytes: int) -> None:
        with torch.cuda.stream(self._copies):
            if self._released[slot] is not None:
                self._copies.wait_event(self._released[slot])
            self.slots[slot][:nbytes].copy_(self._staging[self._turn][:nbytes], non_blocking=True)
            self._filled[slot].record(self._copies)
        self._staged[self._turn] = self._filled[slot]

    def receive(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._filled[slot])

    def release(self, slot: int) -> None:
        self._released[slot] = torch.cuda.current_stream(self._device).record_event()

    def keep_pace(self) -> None:
        self._enqueued.append(torch.cuda.current_stream(self._device).record_event())
        if len(self._enqueued) > _BLOCKS_AHEAD:
            self._enqueued.popleft().synchronize()

    def close(self) -> None:
        self._copies.synchronize()
        self.slots.clear()
        self._staging.clear()


def make_ring(device: torch.device, slots: int, nbytes: int) -> Ring:
    """A ring of `slots` buffers of `nbytes` on the device."""
    return CudaRing(device, slots, nbytes) if device.type == "cuda" else HostRing(slots, nbytes)
