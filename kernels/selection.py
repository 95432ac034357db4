"""Which tiles of keys a tile of queries reads, and attention to these alone.

Tiles of queries and of keys are represented by their means. The softmax of the scores of these tells what share of a
query tile's probability a key tile has, about; the likeliest are read until they have the share that is asked for.
Means say nothing of a tile whose members disagree with each other (the cosine test of SpargeAttn, arXiv:2502.18137):
such keys are read by all queries, and such queries read all keys. So are those that the caller names, and a query
tile's own neighbourhood. What this misses is measured elsewhere: `models/dit/sparse.py`.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from skyrun.kernels.attention import Keys, PassingValues, attend
from skyrun.kernels.machine.device import uses_triton
from skyrun.kernels.quantized_keys import HEAD_DIM, KeyRoom
from skyrun.kernels.tiles import SMALL, USUAL, Pools, Selection, Tiles
from skyrun.kernels.torch import selection as torch_selection

_FEW = 4096  # tokens below which the usual tiles are too large to skip any
_LISTS = 0.005  # of the bytes of keys and values, what lists may take at a time


def tiles_for(tokens: int, device: torch.device) -> Tiles:
    """The tiles of attention to that many tokens. The Triton kernels have one size."""
    return USUAL if tokens >= _FEW or uses_triton(device) else SMALL


def tiles_at_once(keys: int, heads: int, tiles: Tiles) -> int:
    """For how many query tiles lists are made at a time, so that they take little memory beside the keys."""
    values = 2 * 2 * keys * heads * HEAD_DIM  # bytes of keys and values in 16 bits
    a_row = 2 * heads * tiles.count_keys(keys)
    return max(1, int(_LISTS * values / a_row))


@dataclass(frozen=True)
class Read:
    """What was attended to. out: [L, heads * 128]. read: int64 [heads], tiles that were read, of `all` in a head."""

    out: Tensor
    read: Tensor
    all: int


class TiledKeys:
    """Keys and values with the means of their tiles.

    Args:
        k, v: [M, heads * 128] each, as `Keys` has them, and handed over.
        heads: their number.
        precision: of attention, as `Keys` has it.
        tiles: the sizes of tiles.
        always: ranges of keys that all queries read.
    """

    def __init__(
        self,
        k: Tensor | KeyRoom,
        v: Tensor | PassingValues,
        heads: int,
        precision: str,
        tiles: Tiles,
        always: tuple[tuple[int, int], ...],
    ) -> None:
        rows = k.keys if isinstance(k, KeyRoom) else k
        self.tiles, self.heads, self.count = tiles, heads, len(rows)
        self._pools = _kernels(rows.device).pool(rows, tiles.keys, rows.mean(0, dtype=torch.float32))
        flags = torch.zeros(tiles.count_keys(self.count), dtype=torch.bool)
        for start, stop in always:
            flags[start // tiles.keys : -(-stop // tiles.keys)] = True
        self._always = flags.to(rows.device)
        self.keys = Keys(k, v, heads, precision)

    @property
    def checked(self) -> tuple[Tensor, ...]:
        """Tensors that are not finite if a key or a value was not."""
        return self.keys.checked

    def prepare(self) -> None:
        """Quantize the keys, so that all queries meet the same numbers. The caller must have let the originals go."""
        self.keys.prepare()

    def attend(self, q: Tensor, starts: list[int], shares: Tensor, out: Tensor | None = None) -> Read:
        """Attend from q [L, heads * 128] to the keys that each of its tiles needs.

        Args:
            q: the queries, whole tiles but for the last.
            starts: for every tile of queries, the number of its first one among the keys.
            shares: float32 [heads], on the device: the share of probability that is kept; 1 reads all keys.
            out: what the result is written to, in a dtype of its own; None stands for new memory, in that of q.
        """
        at_once, rows = tiles_at_once(self.count, self.heads, self.tiles), self.tiles.queries
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        read = torch.zeros(self.heads, dtype=torch.int64, device=q.device)
        for first in range(0, len(starts), at_once):
            part = slice(first * rows, (first + at_once) * rows)
            chosen = self.choose(q[part], starts[first : first + at_once], shares)
            out[part] = attend(q[part], self.keys, chosen, out.dtype)
            read += chosen.read()
        return Read(out, read, len(starts) * self.tiles.count_keys(self.count))

    def choose(self, q: Tensor, starts: list[int], shares: Tensor) -> Selection:
        """Which tiles of keys the tiles of q read; arguments as of `attend`."""
        kernels = _kernels(q.device)
        pools: Pools = kernels.pool(q, self.tiles.queries, None)
        first = torch.tensor(starts, dtype=torch.int32).to(q.device, non_blocking=True)
        chosen: Selection = kernels.choose(pools, self._pools, shares, first, self._always, self.count, self.tiles)
        return chosen


def _kernels(device: torch.device) -> ModuleType:
    if not uses_triton(device):
        return torch_selection
    from skyrun.kernels.triton import selection as triton_selection

    return triton_selection
