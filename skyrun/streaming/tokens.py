"""The tokens of a clip between blocks: on the device, or parked on the host, from where they come in parts."""

from typing import Protocol

import torch
from torch import Tensor

from skyrun.streaming.staging import Parking


class Tokens(Protocol):
    """Activations [L, D] of all tokens, or of those that this process has. shape: (L, D), of all. parked: whether they
    wait on the host.

    Rows are counted from the first token of all, on every process.
    """

    shape: torch.Size
    dtype: torch.dtype
    parked: bool

    def fetch(self, rows: slice) -> Tensor:
        """Some rows, on the device. They must not be changed."""

    def store(self, rows: slice, values: Tensor) -> None:
        """Replace some rows by values of the device."""

    def close(self) -> None:
        """Let go of the memory."""


class HeldTokens:
    """Tokens that stay on the device. own: those that this process has, by default all."""

    parked = False

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, own: slice | None = None
    ) -> None:
        own = own or slice(0, shape[0])
        self._values = torch.empty((own.stop - own.start, shape[1]), dtype=dtype, device=device)
        self.shape, self.dtype, self._first = torch.Size(shape), dtype, own.start

    def fetch(self, rows: slice) -> Tensor:
        return self._values[_from(self._first, rows)]

    def store(self, rows: slice, values: Tensor) -> None:
        self._values[_from(self._first, rows)] = values

    def close(self) -> None:
        del self._values


class ParkedTokens:
    """Tokens that wait on the host, in ordinary memory: only two buffers on the way are page-locked.

    own: those that this process has, by default all.
    """

    parked = True

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, own: slice | None = None
    ) -> None:
        own = own or slice(0, shape[0])
        self._values, self._device = torch.empty((own.stop - own.start, shape[1]), dtype=dtype), device
        self.shape, self.dtype, self._first = torch.Size(shape), dtype, own.start
        self._parking = Parking(device) if device.type == "cuda" else None

    def fetch(self, rows: slice) -> Tensor:
        waiting = self._values[_from(self._first, rows)]
        values = torch.empty_like(waiting, device=self._device)
        if self._parking is None:
            return values.copy_(waiting)
        self._parking.fetch(_bytes(waiting), _bytes(values))
        return values

    def store(self, rows: slice, values: Tensor) -> None:
        waiting = self._values[_from(self._first, rows)]
        if self._parking is None:
            waiting.copy_(values)
        else:
            self._parking.store(_bytes(values.contiguous()), _bytes(waiting))

    def close(self) -> None:
        if self._parking is not None:
            self._parking.close()


def _from(first: int, rows: slice) -> slice:
    return slice(rows.start - first, rows.stop - first)


def _bytes(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8).flatten()
