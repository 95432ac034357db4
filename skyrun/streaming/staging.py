"""Page-locked memory on the host: what a copy to or from a GPU needs to be quick, and to run beside computing."""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from skyrun.presets.memory import PARKING_PIECE, PARKING_PIECES
from skyrun.streaming.reader import PAGE

_PORTABLE = 1  # cudaHostRegisterPortable


class PageLocked:
    """Page-aligned memory on the host: room for pieces of `nbytes`, page-locked if the system allows it.

    The memory is registered with CUDA because torch's own page-locked allocations are rounded up to powers of two and
    are never given back, and Windows and WSL lock little.

    counts: how many pieces there shall be, and how many will do where less can be locked, most first.
    """

    def __init__(self, device: torch.device, nbytes: int, counts: Sequence[int]) -> None:
        self._locked, self._memory = False, torch.empty(0)
        for count in counts:
            self._memory = page_aligned(count * nbytes)
            registered = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.nbytes, _PORTABLE)
            if int(registered) == 0:
                self._locked = True
                break
            with suppress(RuntimeError):  # the next kernel would report the failure as its own: run one here
                torch.ones(1, device=device)
        self.pieces: list[Tensor] = list(self._memory.split(nbytes))

    def close(self) -> None:
        """Unlock the memory. No copy may still use it."""
        self.pieces.clear()
        if self._locked:
            self._locked = False
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())


class Parking:
    """Copies between ordinary memory of the host and a GPU, in pieces through two page-locked buffers.

    While one buffer travels the host fills or empties the other. The device's current stream does the copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = PageLocked(device, PARKING_PIECE, [PARKING_PIECES])
        self._copied = [torch.cuda.Event(blocking=True) for _ in self._buffers.pieces]

    def fetch(self, host: Tensor, target: Tensor) -> None:
        """Copy bytes of the host, uint8 [n], to the device. It may overtake nothing that is enqueued later."""
        for turn, part in enumerate(_parts(len(host))):
            buffer = self._free(turn)[: part.stop - part.start]
            buffer.copy_(host[part])
            target[part].copy_(buffer, non_blocking=True)
            self._copied[turn % PARKING_PIECES].record(torch.cuda.current_stream(self._device))

    def store(self, source: Tensor, host: Tensor) -> None:
        """Copy bytes of the device, uint8 [n], to the host. When it returns they are there."""
        parts = _parts(len(host))
        for turn, part in enumerate([*parts, None]):
            if part is not None:
                buffer = self._free(turn)[: part.stop - part.start]
                buffer.copy_(source[part], non_blocking=True)
                self._copied[turn % PARKING_PIECES].record(torch.cuda.current_stream(self._device))
            if turn:
                before = parts[turn - 1]
                host[before].copy_(self._free(turn - 1)[: before.stop - before.start])

    def close(self) -> None:
        """Wait for the copies and unlock the buffers."""
        try:
            for copied in self._copied:
                copied.synchronize()
        finally:
            self._buffers.close()

    def _free(self, turn: int) -> Tensor:
        """A turn's buffer, once the last copy from or to it is done."""
        self._copied[turn % PARKING_PIECES].synchronize()
        return self._buffers.pieces[turn % PARKING_PIECES]


def _parts(nbytes: int) -> list[slice]:
    return [slice(start, min(start + PARKING_PIECE, nbytes)) for start in range(0, nbytes, PARKING_PIECE)]


def page_aligned(nbytes: int) -> Tensor:
    """Allocate page-aligned bytes on the host."""
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % PAGE :][:nbytes]
