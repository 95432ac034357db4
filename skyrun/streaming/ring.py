"""Rings of buffers that hand blocks of weights to a device: page-locked staging, copies on a stream of their own."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from skyrun.presets.memory import STAGING_PIECES, piece_bytes
from skyrun.streaming.reader import PAGE

Arrival = Any  # of bytes sent to a device: an event on it, None on a CPU

_BLOCKS_AHEAD = 2
_PORTABLE = 1  # cudaHostRegisterPortable


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
