"""The memory layout in which encoders search, and their buffers.

Blocks lie side by side: a tile is [block_size, n], with a block's weights along the first axis and blocks along the
contiguous one. A sum or a maximum over a group of weights then works on whole rows of blocks, which vectorises, and
each operation on a tile stays in the cache. Operations on groups process far fewer values; they are done for a batch of
tiles at a time, so that the cost of calls does not dominate.
"""

import threading
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

_LANES = 32  # with fewer blocks, torch's kernels would take another code path and round differently
# Weights in a tile, tiles in a batch. On a CPU a tile, its codes and a scratch buffer fit into the cache of a core; on
# other devices calls cost more than memory.
_CPU_TILE, _CPU_TILES = 384 * 256, 5
_TILE, _TILES = 1 << 22, 1

# (weights float32 [block_size, n], importance of the same shape or None, buffers) -> blocks uint8 [n, block_bytes]
EncodeTile = Callable[[Tensor, Tensor | None, "Workspace"], Tensor]
# The same for a batch: weights float32 [tiles, block_size, n] -> blocks uint8 [tiles * n, block_bytes]
EncodeBatch = Callable[[Tensor, Tensor | None, "Workspace"], Tensor]


class Workspace:
    """Reusable buffers by name: on a CPU, page faults of newly allocated memory cost more than the arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer called `name`, with whatever content it had before."""
        size = prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < size:
            with torch.inference_mode(False):  # so that it can be used in either mode
                buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return buffer[:size].view(shape)


_local = threading.local()


def _workspace(device: torch.device) -> Workspace:
    workspaces: dict[torch.device, Workspace] = _local.__dict__.setdefault("workspaces", {})
    return workspaces.setdefault(device, Workspace(device))


def _encode(x: Tensor, importance: Tensor | None, tile: int, tiles: int, encode: EncodeBatch) -> Tensor:
    """Encode batches of up to `tiles` tiles of up to `tile` blocks, a multiple of 32. Tiles are padded with zeros."""
    count, width = x.shape
    space = _workspace(x.device)
    columns = None if importance is None else importance.T.contiguous()
    encoded = []
    for start in range(0, max(count, 1), tile * tiles):
        some = x[start : start + tile * tiles]
        used = max(1, -(-len(some) // tile))
        lanes = max(1, -(-len(some) // (used * _LANES))) * _LANES
        batch = space("batch", used, width, lanes)
        for i, out in enumerate(batch):
            part = some[i * lanes : (i + 1) * lanes]
            out[:, : len(part)] = part.T
            out[:, len(part) :] = 0
        weights = None
        if columns is not None:
            weights = space("importance", used, width, lanes)
            rows = torch.arange(start, start + used * lanes, device=x.device) % columns.shape[1]
            for out, of_tile in zip(weights, rows.view(used, lanes), strict=True):
                torch.index_select(columns, 1, of_tile, out=out)
        encoded.append(encode(batch, weights, space)[: len(some)].clone())
    return torch.cat(encoded)


def in_batches(x: Tensor, importance: Tensor | None, encode: EncodeBatch) -> Tensor:
    """Encode blocks, a batch of tiles at a time: float32 [n, block_size] -> uint8 [n, block_bytes].

    The bytes do not depend on how the blocks are divided into tiles.

    Args:
        x: the blocks.
        importance: float32 [k, block_size]; block i has the importance of row i % k.
        encode: encodes a batch.
    """
    weights, tiles = (_CPU_TILE, _CPU_TILES) if x.device.type == "cpu" else (_TILE, _TILES)
    return _encode(x, importance, weights // x.shape[1], tiles, encode)


def in_tiles(x: Tensor, importance: Tensor | None, tile: int, encode: EncodeTile) -> Tensor:
    """As in_batches, but one tile of up to `tile` blocks, a multiple of 32, at a time."""

    def single(batch: Tensor, weights: Tensor | None, space: Workspace) -> Tensor:
        return encode(batch[0], None if weights is None else weights[0], space)

    return _encode(x, importance, tile, 1, single)
