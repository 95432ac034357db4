"""The layout in which encoders search, and the memory they search in.

Blocks lie side by side: a tile is [block_size, n], weight by weight along the first axis and block by block along the
contiguous one. A sum or a maximum over a group of weights then adds whole rows of blocks, which vectorises, and each
operation on a tile stays inside the cache.
"""

import threading
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

_LANES = 32  # a tile of fewer blocks would take another code path of torch's kernels and round differently

# (weights float32 [block_size, n], importance of the same shape or None, buffers) -> blocks uint8 [n, block_bytes]
EncodeTile = Callable[[Tensor, Tensor | None, "Workspace"], Tensor]


class Workspace:
    """Buffers by name, made once per size: on a CPU, page faults of fresh memory cost more than the arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer called `name`, holding whatever it held last."""
        size = prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return buffer[:size].view(shape)


_local = threading.local()


def _workspace(device: torch.device) -> Workspace:
    workspaces: dict[torch.device, Workspace] = _local.__dict__.setdefault("workspaces", {})
    return workspaces.setdefault(device, Workspace(device))


def in_tiles(x: Tensor, importance: Tensor | None, tile: int, encode: EncodeTile) -> Tensor:
    """Encode blocks tile by tile: float32 [n, block_size] -> uint8 [n, block_bytes].

    importance: float32 [k, block_size]; block i has that of row i % k. tile: blocks in a tile, a multiple of 32; the
    last tile is filled up with zeros, so that the bytes do not depend on how the blocks were divided.
    """
    count, width = x.shape
    space = _workspace(x.device)
    encoded = []
    for start in range(0, count, tile):
        some = x[start : start + tile]
        padded = -(-len(some) // _LANES) * _LANES
        lanes = space("lanes", width, padded)
        lanes[:, : len(some)] = some.T
        lanes[:, len(some) :] = 0
        weights = None
        if importance is not None:
            rows = torch.arange(start, start + padded, device=x.device) % len(importance)
            weights = space("importance", width, padded).copy_(importance[rows].T)
        encoded.append(encode(lanes, weights, space)[: len(some)].clone())
    return torch.cat(encoded)
