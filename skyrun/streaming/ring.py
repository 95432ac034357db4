"""Rings of buffers that transfer blocks to a device, with page-locked staging and a CUDA stream for the copies."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from skyrun.errors import SkyrunError
from skyrun.presets.memory import STAGING_PIECES, piece_bytes
from skyrun.streaming.reader import PAGE
from skyrun.streaming.shares import Gathering
from skyrun.streaming.staging import PageLocked, page_aligned

Arrival = Any  # when bytes have arrived on a device: a CUDA event, or None on a CPU

_BLOCKS_AHEAD = 2


class Ring(Protocol):
    """A fixed number of equal buffers on a device, which reader threads fill and the model uses one after the other.

    slots: the buffers. kept: further buffers, for blocks that stay on the device. staged: whether bytes pass through
    staging buffers on the host, of `piece_bytes` each.
    """

    slots: list[Tensor]
    kept: list[Tensor]
    staged: bool
    piece_bytes: int

    def staging(self) -> AbstractContextManager[Tensor]:
        """Reader: a free staging buffer on the host. Waits until there is one."""

    def send(self, moves: Iterable[tuple[Tensor, Tensor]], slot: int | None) -> Arrival:
        """Reader: start copies, (to, from), from staging to the slot's buffer, or to a kept one if it is None."""

    def gather(self, start: Callable[[], Gathering], slot: int | None) -> Gathering:
        """Model: start an exchange of a buffer's parts, once what was sent to it so far is there and others may be
        overwritten. slot: of the buffer, or None for a kept one."""

    def receive(self, arrivals: Iterable[Arrival]) -> None:
        """Model: make work that is enqueued from now on wait for these arrivals."""

    def release(self, slot: int) -> None:
        """Model: the slot may be overwritten once the work enqueued so far is done."""

    def keep_pace(self) -> None:
        """Model: after a block, wait until the device is at most two blocks behind, so that measured times are real."""

    def close(self, unfinished: Gathering | None = None) -> None:
        """Free the buffers once all copies into them are done. unfinished: an exchange that was not waited for."""


class HostRing:
    """The ring of a CPU: files are read straight into the slots. Only pieces that are repacked are staged."""

    staged = False

    def __init__(self, slots: int, kept: int, nbytes: int) -> None:
        self.slots, self.kept = ([page_aligned(nbytes) for _ in range(count)] for count in (slots, kept))
        self.piece_bytes = piece_bytes(nbytes)

    @contextmanager
    def staging(self) -> Iterator[Tensor]:
        yield page_aligned(self.piece_bytes)

    def send(self, moves: Iterable[tuple[Tensor, Tensor]], slot: int | None) -> Arrival:
        for target, source in moves:
            target.copy_(source)

    def gather(self, start: Callable[[], Gathering], slot: int | None) -> Gathering:
        return start()

    def receive(self, arrivals: Iterable[Arrival]) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def keep_pace(self) -> None:
        pass

    def close(self, unfinished: Gathering | None = None) -> None:
        self.slots.clear()  # what is still on its way keeps its memory
        self.kept.clear()


class CudaRing:
    """The ring of a GPU: slots in device memory, filled from a few page-locked buffers on a stream of its own.

    CUDA events order the copies and the model's kernels. On the host only readers wait for copies, and the model only
    waits for kernels of two blocks ago. Threads sleep while they wait, instead of spinning.
    """

    staged = True

    def __init__(self, device: torch.device, slots: int, kept: int, nbytes: int) -> None:
        self.piece_bytes = piece_bytes(nbytes)
        self._device = device
        self._copies = torch.cuda.Stream(device)
        # One allocation, before there are activations: buffers that come between these would cut up the memory.
        room = -(-nbytes // PAGE) * PAGE
        slab = torch.empty((slots + kept) * room, dtype=torch.uint8, device=device)
        self._copies.wait_stream(torch.cuda.current_stream(device))  # where the memory may still be in use
        buffers = [part[:nbytes] for part in slab.split(room)]
        self.slots, self.kept = buffers[:slots], buffers[slots:]
        self._released: list[Any] = [None] * slots
        self._enqueued: deque[Any] = deque()
        self._staging: SimpleQueue[tuple[Tensor, Any]] = SimpleQueue()
        self._locked = PageLocked(device, self.piece_bytes, (STAGING_PIECES, STAGING_PIECES // 2, STAGING_PIECES // 4))
        try:
            for buffer in self._locked.pieces:
                self._staging.put((buffer, torch.cuda.Event(blocking=True)))
        except BaseException:
            self.close()
            raise

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

    def gather(self, start: Callable[[], Gathering], slot: int | None) -> Gathering:
        # What exchanges waits for the stream that is current when it is started: not for kernels, only for the copies,
        # and for the kernels of the block before, for which none of these may have waited if the own share is empty.
        with torch.cuda.stream(self._copies):
            if slot is not None and self._released[slot] is not None:
                self._copies.wait_event(self._released[slot])
            return start()

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

    def close(self, unfinished: Gathering | None = None) -> None:
        try:
            if unfinished is not None:  # the host does not wait: others may be gone
                with suppress(SkyrunError):
                    unfinished.wait()
            self._copies.synchronize()
        finally:
            self._locked.close()
            self._staging = SimpleQueue()
            self.slots.clear()
            self.kept.clear()


def make_ring(device: torch.device, slots: int, kept: int, nbytes: int) -> Ring:
    """Make a ring of `slots` buffers of `nbytes` on the device, and `kept` more for blocks that stay there."""
    return CudaRing(device, slots, kept, nbytes) if device.type == "cuda" else HostRing(slots, kept, nbytes)
