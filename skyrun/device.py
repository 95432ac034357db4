"""The device: which one, what it holds, and rings of buffers that hand blocks of weights to it.

The only file of the runner that talks to CUDA.
"""

import platform
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from queue import SimpleQueue
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from skyrun.errors import WILL_NOT_FIT, SkyrunError
from skyrun.presets.memory import STAGING_PIECES, piece_bytes
from skyrun.reader import PAGE

Arrival = Any  # of bytes sent to a device: an event on it, None on a CPU

_BLOCKS_AHEAD = 2
_SPILLS = sys.platform == "win32" or "microsoft" in platform.release().lower()  # Windows' driver, under WSL too
_SPILL_SHARE = 0.01  # of the device, below which memory is moved
_PORTABLE = 1  # cudaHostRegisterPortable
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


def refuse_to_spill(device: torch.device) -> None:
    """torch.OutOfMemoryError where Windows is about to move the device's memory to the host.

    Its driver does that rather than let an allocation fail, when other programs take what this one counted on; every
    step would take several times as long.
    """
    if device.type != "cuda" or not _SPILLS:
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < _SPILL_SHARE * total:
        left = f"{free >> 20} MiB of GPU memory are left"
        raise torch.OutOfMemoryError(f"{left}: other programs use it too, and Windows would turn to RAM")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def out_of_memory(error: BaseException) -> SkyrunError:
    """What to say of a failed allocation."""
    cause = str(error).splitlines()[0] if str(error) else "the system gave no more"
    hint = "use a smaller --resolution or --size or fewer --seconds, or close other programs"
    return SkyrunError(f"out of memory: {cause}", hint, WILL_NOT_FIT)


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Turn a failed allocation into a SkyrunError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error) from error


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
    """A fixed number of equal buffers on a device, filled in turn by threads that read, used in turn by a model.

    staged: bytes for a buffer have to pass through others on the host, of `piece_bytes` each.
    """

    slots: list[Tensor]
    staged: bool
    piece_bytes: int

    def allocate(self, nbytes: int) -> Tensor:
        """Reader: another buffer on the device, for what stays there."""

    def staging(self) -> AbstractContextManager[Tensor]:
        """Reader: a buffer on the host whose content has been sent. Waits until there is one."""

    def send(self, moves: Iterable[tuple[Tensor, Tensor]], slot: int | None) -> Arrival:
        """Reader: copy from staging to places in the slot's buffer, or one that was allocated: pairs (to, from)."""

    def receive(self, arrivals: Iterable[Arrival]) -> None:
        """Model: work enqueued from here on sees what was sent."""

    def release(self, slot: int) -> None:
        """Model: work enqueued so far is the last that uses the slot."""

    def keep_pace(self) -> None:
        """Model: a block is enqueued. Wait until the device is at most two behind, so that times mean something."""

    def close(self) -> None:
        """Let go of the buffers, once no copy into them is under way."""


class HostRing:
    """On a CPU a slot is the memory that is read into. Only what has to be laid out anew is staged."""

    staged = False

    def __init__(self, slots: int, nbytes: int) -> None:
        self.slots = [self.allocate(nbytes) for _ in range(slots)]
        self.piece_bytes = piece_bytes(nbytes)

    def allocate(self, nbytes: int) -> Tensor:
        return page_aligned(nbytes)

    @contextmanager
    def staging(self) -> Iterator[Tensor]:
        yield self.allocate(self.piece_bytes)

    def send(self, moves: Iterable[tuple[Tensor, Tensor]], slot: int | None) -> Arrival:
        for target, source in moves:
            target.copy_(source)

    def receive(self, arrivals: Iterable[Arrival]) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def keep_pace(self) -> None:
        pass

    def close(self) -> None:
        self.slots.clear()


class CudaRing:
    """Slots in device memory behind a few page-locked buffers, from which a stream of its own copies.

    Events order the copies with the model's kernels: only readers wait for copies, and the model for no kernel but
    those of two blocks ago. Events are waited for asleep, not spinning.
    """

    staged = True

    def __init__(self, device: torch.device, slots: int, nbytes: int) -> None:
        self.piece_bytes = piece_bytes(nbytes)
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self.slots = [self.allocate(nbytes) for _ in range(slots)]
        self._released: list[Any] = [None] * slots
        self._enqueued: deque[Any] = deque()
        self._locked, memory = _page_locked(device, self.piece_bytes)
        self._staging: SimpleQueue[tuple[Tensor, Any]] = SimpleQueue()
        for buffer in memory.split(self.piece_bytes):
            self._staging.put((buffer, torch.cuda.Event(blocking=True)))
        self._address = memory.data_ptr()

    def allocate(self, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))  # the memory may still be in use there
        return buffer

    @contextmanager
    def staging(self) -> Iterator[Tensor]:
        buffer, copied = self._staging.get()
        try:
            copied.synchronize()
            yield buffer
        finally:
            copied.record(self._copies)
            self._staging.put((buffer, copied))

    def send(self, moves: Iterable[tuple[Tensor, Tensor]], slot: int | None) -> Arrival:
        with torch.cuda.stream(self._copies):
            if slot is not None and self._released[slot] is not None:
                self._copies.wait_event(self._released[slot])
            for target, source in moves:
                target.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def receive(self, arrivals: Iterable[Arrival]) -> None:
        for arrival in arrivals:
            torch.cuda.current_stream(self._device).wait_event(arrival)

    def release(self, slot: int) -> None:
        self._released[slot] = torch.cuda.current_stream(self._device).record_event()

    def keep_pace(self) -> None:
        enqueued = torch.cuda.Event(blocking=True)
        enqueued.record(torch.cuda.current_stream(self._device))
        self._enqueued.append(enqueued)
        if len(self._enqueued) > _BLOCKS_AHEAD:
            self._enqueued.popleft().synchronize()

    def close(self) -> None:
        self._copies.synchronize()
        if self._locked:
            self._locked = False
            torch.cuda.cudart().cudaHostUnregister(self._address)
        self._staging = SimpleQueue()
        self.slots.clear()


def make_ring(device: torch.device, slots: int, nbytes: int) -> Ring:
    """A ring of `slots` buffers of `nbytes` on the device."""
    return CudaRing(device, slots, nbytes) if device.type == "cuda" else HostRing(slots, nbytes)


def page_aligned(nbytes: int) -> Tensor:
    """Bytes on the host that begin where a page of memory does."""
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % PAGE :][:nbytes]


def _page_locked(device: torch.device, nbytes: int) -> tuple[bool, Tensor]:
    """Memory for some pieces of `nbytes`, and whether it is page-locked; fewer pieces where not as much can be.

    An allocation that is registered has the size that it was asked for; torch's own are rounded up to powers of two.
    """
    memory, cudart = torch.empty(0), torch.cuda.cudart()
    for pieces in (STAGING_PIECES, STAGING_PIECES // 2, STAGING_PIECES // 4):
        memory = page_aligned(pieces * nbytes)
        if int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)) == 0:
            return True, memory
        with suppress(RuntimeError):  # a kernel would report the failure as its own: let it be this one
            torch.ones(1, device=device)
    return False, memory
