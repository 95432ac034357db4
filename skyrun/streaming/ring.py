"""Rings of buffers that transfer blocks to a device, with page-locked staging and a CUDA stream for the copies."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from skyrun.presets.memory import STAGING_PIECES, piece_bytes
from skyrun.streaming.reader import PAGE

Arrival = Any  # when bytes have arrived on a device: a CUDA event, or None on a CPU

_BLOCKS_AHEAD = 2
_PORTABLE = 1  # cudaHostRegisterPortable


class Ring(Protocol):
    """A fixed number of equal buffers on a device, which reader threads fill and the model uses one after the other.

    slots: the buffers. staged: whether bytes pass through staging buffers on the host, of `piece_bytes` each.
    """

    slots: list[Tensor]
    staged: bool
    piece_bytes: int

    def allocate(self, nbytes: int) -> Tensor:
        """Reader: allocate another buffer on the device, for a block that stays there."""

    def staging(self) -> AbstractContextManager[Tensor]:
        """Reader: a free staging buffer on the host. Waits until there is one."""

    def send(self, moves: Iterable[tuple[Tensor, Tensor]], slot: int | None) -> Arrival:
        """Reader: start copies, (to, from), from staging to the slot's buffer, or to an allocated one if it is None."""

    def receive(self, arrivals: Iterable[Arrival]) -> None:
        """Model: make work that is enqueued from now on wait for these arrivals."""

    def release(self, slot: int) -> None:
        """Model: the slot may be overwritten once the work enqueued so far is done."""

    def keep_pace(self) -> None:
        """Model: after a block, wait until the device is at most two blocks behind, so that measured times are real."""

    def close(self) -> None:
        """Free the buffers once all copies into them are done."""


class HostRing:
    """The ring of a CPU: files are read straight into the slots. Only pieces that are repacked are staged."""

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
    """The ring of a GPU: slots in device memory, filled from a few page-locked buffers on a stream of its own.

    CUDA events order the copies and the model's kernels. On the host only readers wait for copies, and the model only
    waits for kernels of two blocks ago. Threads sleep while they wait, instead of spinning.
    """

    staged = True

    def __init__(self, device: torch.device, slots: int, nbytes: int) -> None:
        self.piece_bytes = piece_bytes(nbytes)
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self.slots = [self.allocate(nbytes) for _ in range(slots)]
        self._released: list[Any] = [None] * slots
        self._enqueued: deque[Any] = deque()
        self._staging: SimpleQueue[tuple[Tensor, Any]] = SimpleQueue()
        self._locked, memory = _page_locked(device, self.piece_bytes)
        self._address = memory.data_ptr()
        try:
            for buffer in memory.split(self.piece_bytes):
                self._staging.put((buffer, torch.cuda.Event(blocking=True)))
        except BaseException:
            self.close()
            raise

    def allocate(self, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))  # where the memory may still be in use
        return buffer

    @contextmanager
    def staging(self) -> Iterator[Tensor]:
        buffer, copied = self._staging.get()
        try:
            copied.synchronize()
            yield buffer
        finally:
            try:
                copied.record(self._copies)
            finally:  # without the buffer, other threads would wait for it forever
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
        try:
            self._copies.synchronize()
        finally:
            if self._locked:
                self._locked = False
                torch.cuda.cudart().cudaHostUnregister(self._address)
            self._staging = SimpleQueue()
            self.slots.clear()


def make_ring(device: torch.device, slots: int, nbytes: int) -> Ring:
    """Make a ring of `slots` buffers of `nbytes` on the device."""
    return CudaRing(device, slots, nbytes) if device.type == "cuda" else HostRing(slots, nbytes)


def page_aligned(nbytes: int) -> Tensor:
    """Allocate page-aligned bytes on the host."""
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % PAGE :][:nbytes]


def _page_locked(device: torch.device, nbytes: int) -> tuple[bool, Tensor]:
    """Whether memory is page-locked, and the memory: room for a few pieces of `nbytes`, fewer if less can be locked.

    The memory is registered with CUDA because torch's own page-locked allocations are rounded up to powers of two.
    """
    memory, cudart = torch.empty(0), torch.cuda.cudart()
    for pieces in (STAGING_PIECES, STAGING_PIECES // 2, STAGING_PIECES // 4):
        memory = page_aligned(pieces * nbytes)
        if int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)) == 0:
            return True, memory
        with suppress(RuntimeError):  # the next kernel would report the failure as its own: run one here
            torch.ones(1, device=device)
    return False, memory
