"""The tokens of a clip between blocks: on the device, or parked on the host, from where they come in parts."""

from typing import Protocol

import torch
from torch import Tensor

from skyrun.streaming.staging import Parking


class Tokens(Protocol):
    """Activations [L, D] of all tokens. shape: (L, D)."""

    shape: torch.Size
    dtype: torch.dtype

    def fetch(self, rows: slice) -> Tensor:
        """Some rows, on the device. They must not be changed."""

    def store(self, rows: slice, values: Tensor) -> None:
        """Replace some rows by values of the device."""

    def close(self) -> None:
        """Let go of the memory."""


class HeldTokens:
    """Tokens that stay on the device."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self.shape, self.dtype = self._values.shape, dtype

    def fetch(self, rows: slice) -> Tensor:
        return self._values[rows]

    def store(self, rows: slice, values: Tensor) -> None:
        self._values[rows] = values

    def close(self) -> None:
        del self._values


class ParkedTokens:
    """Tokens that wait on the host, in ordinary memory: only two buffers on the way are page-locked."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._values, self._device = torch.empty(shape, dtype=dtype), device
        self.shape, self.dtype = self._values.shape, dtype
        self._parking = Parking(device) if device.type == "cuda" else None

    def fetch(self, rows: slice) -> Tensor:
        values = torch.empty_like(self._values[rows], device=self._device)
        if self._parking is None:
            return values.copy_(self._values[rows])
        self._parking.fetch(_bytes(self._values[rows]), _bytes(values))
        return values

    def store(self, rows: slice, values: Tensor) -> None:
        if self._parking is None:
            self._values[rows] = values
        else:
            self._parking.store(_bytes(values.contiguous()), _bytes(self._values[rows]))

    def close(self) -> None:
        if self._parking is not None:
            self._parking.close()


def _bytes(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8).flatten()
