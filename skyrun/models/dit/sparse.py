"""Attention that skips what does not matter, as far as an error allows that is measured on the run at hand.

The first step of a window is dense. On a sample of query tiles it learns, for each block and head, what keeping less of
the probability would have cost: the relative error of the output, against all keys in the same precision. A head keeps
the least whose error stays under the bound, or all if nothing does. Every later step looks at other queries before it
attends, and heads that are off by more than the bound keep more from then on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from skyrun.events import Attended
from skyrun.kernels.attention import Keys, PassingValues, attend
from skyrun.kernels.quantized_keys import KeyRoom
from skyrun.kernels.selection import TiledKeys
from skyrun.models.dit.tile_order import TileOrder

# Of the probability that means of tiles promise, what is kept; the first keeps all.
SHARES = (1.0, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.45, 0.3)
SAMPLED = 12  # tiles of queries that are looked at in a step
_MARGIN = 0.95  # of the bound, what a sample may reach
_DOUBT = 2.0  # standard errors of a sample that count as error
_GOLDEN = (math.sqrt(5) - 1) / 2

Queries = Callable[[slice], Tensor]  # the queries of a range of tokens


@dataclass(frozen=True)
class Learned:
    """What is known of the attention of a run, on the host.

    levels: int8 [contexts, blocks, heads], indexes of SHARES, of the current window; None before its first step. steps:
    float32 [n, blocks, 3], for every step so far the density, the largest error of a head (-1 in a first step, which is
    dense), and the share of heads that are dense. ValueError for tensors that are something else.
    """

    levels: Tensor | None = None
    steps: Tensor | None = None

    def __post_init__(self) -> None:
        levels, steps = self.levels, self.steps
        if levels is not None and (
            levels.dtype != torch.int8 or levels.dim() != 3 or not ((levels >= 0) & (levels < len(SHARES))).all()
        ):
            raise ValueError("what its attention keeps is not known as levels of heads")
        if steps is not None and (steps.dtype != torch.float32 or steps.shape[2:] != (3,)):
            raise ValueError("what its attention read is not known by steps and blocks")

    def anew(self) -> "Learned":
        """For the next window, which learns anew."""
        return replace(self, levels=None)

    def summary(self) -> "Skipped | None":
        """Of the steps that were not the first of a window; None if there are none."""
        steps = torch.empty(0, 1, 3) if self.steps is None else self.steps[self.steps[:, 0, 1] >= 0]
        if not len(steps):
            return None
        return Skipped(*(float(value) for value in (steps[..., 0].mean(), steps[..., 1].max(), steps[..., 2].mean())))


@dataclass(frozen=True)
class Skipped:
    """What attention has skipped in a run, after the first steps of its windows, which skip nothing.

    density: the share of tiles that were read. error: the largest relative error of a head's output in any step, as
    measured on samples. dense: the share of heads that skipped nothing.
    """

    density: float
    error: float
    dense: float

    @property
    def text(self) -> str:
        """A sentence for people."""
        said = (
            f"attention read {self.density:.0%} of its tiles after the first step, a head at most {self.error:.2%} off"
        )
        return f"{said}; {self.dense:.0%} of the heads skipped nothing"


class SelfCheck:
    """The attention of a window's blocks, and what it may skip.

    Args:
        bound: relative error that the output of a head may have.
        order: of the tokens.
        shape: contexts, blocks and heads of the model.
        learned: what earlier steps have learned.
    """

    def __init__(self, bound: float, order: TileOrder, shape: tuple[int, int, int], learned: Learned) -> None:
        self.bound, self.order = bound, order
        self._shape, self._learned = shape, learned
        self._begin()

    def _begin(self) -> None:
        before = self.before = self._learned.levels
        self.levels = torch.zeros(self._shape, dtype=torch.int8) if before is None else before.clone()
        self.learns = before is None
        self.errors = torch.zeros(self._shape)
        self.read: dict[tuple[int, int], dict[int, tuple[Tensor, int]]] = {}

    @property
    def step(self) -> int:
        """How many steps of the run are done."""
        return 0 if self._learned.steps is None else len(self._learned.steps)

    def whole_tiles(self, rows: int | None) -> int | None:
        """At least so many tokens that pass through a block at a time, so that tiles of queries are whole."""
        size = self.order.tiles.queries
        return rows and -(-rows // size) * size

    def block(self, context: int, index: int) -> "BlockCheck":
        """The attention of a block with one of the contexts."""
        return BlockCheck(self, context, index)

    def finish_step(self) -> tuple[Learned, tuple[Attended, ...]]:
        """What is known after a step, and the events that say so."""
        contexts, blocks, heads = self._shape
        density = torch.ones(contexts, blocks)
        for (context, index), parts in self.read.items():
            tiles = sum(int(read.sum()) for read, _ in parts.values())
            density[context, index] = tiles / (heads * sum(whole for _, whole in parts.values()))
        dense = torch.ones(blocks) if self.learns else (self.levels == 0).float().mean((0, 2))
        error = torch.full((blocks,), -1.0) if self.learns else self.errors.amax((0, 2))
        row = torch.stack((density.mean(0), error, dense), 1).unsqueeze(0)
        before = self._learned.steps
        self._learned = Learned(self.levels, row if before is None else torch.cat((before, row)))
        event = Attended(
            density=float(density.mean()),
            error=float(error.max().clamp_min(0)),
            dense_heads=int((self.levels == 0).sum()) if not self.learns else contexts * blocks * heads,
            heads=contexts * blocks * heads,
            densities=tuple(density.mean(0).tolist()),
            errors=tuple(error.clamp_min(0).tolist()),
        )
        self._begin()
        return self._learned, (event,)


class BlockCheck:
    """The attention of one block in one step."""

    def __init__(self, check: SelfCheck, context: int, index: int) -> None:
        self._check, self._place = check, (context, index)

    @property
    def _levels(self) -> Tensor:
        return self._check.levels[self._place]

    def keys(self, k: Tensor | KeyRoom, v: Tensor | PassingValues, heads: int, precision: str) -> Keys | TiledKeys:
        """Keys and values [L, heads * 128], which are handed over. Where no head skips anything, they are as ever."""
        if not self._check.learns and not self._levels.any():
            return Keys(k, v, heads, precision)
        return TiledKeys(k, v, heads, precision, self._check.order.tiles, self._check.order.always)

    def look(self, keys: TiledKeys, queries: Queries, runs: Sequence[slice]) -> Tensor:
        """Measure the errors of a sample of queries, and choose what each head keeps. Returns these queries.

        Args:
            keys: of all tokens.
            queries: makes the queries of a range of tokens.
            runs: ranges of tokens that have a time each.
        """
        check = self._check
        keys.prepare()
        sample, count = self._sample(runs)
        q = torch.cat([queries(rows) for rows in sample])
        starts = [rows.start for rows in sample]
        wanted = _by_head(keys.attend(q, starts, shares_at(torch.zeros_like(self._levels), q), torch.float32).out, keys)
        measure = _Measure(keys, q, starts, wanted, count)
        if check.learns:
            self._levels.copy_(measure.sparsest(_MARGIN * check.bound))
            return q
        assert check.before is not None
        levels = check.before[self._place].clone()  # it may have looked already, at numbers that overflowed
        while True:
            errors, _ = measure.errors(levels)
            over = (errors > _MARGIN * check.bound) & (levels > 0)
            if not over.any():
                break
            levels -= over.to(torch.int8)
        self._levels.copy_(levels)
        check.errors[self._place] = errors
        return q

    def attend(self, q: Tensor, keys: TiledKeys, rows: slice) -> Tensor:
        """Attend from the queries [n, heads * 128] of the tokens in `rows`."""
        if self._check.learns or not self._levels.any():
            return attend(q, keys.keys)
        starts = list(range(rows.start, rows.stop, keys.tiles.queries))
        result = keys.attend(q, starts, shares_at(self._levels, q))
        self._check.read.setdefault(self._place, {})[rows.start] = (result.read, result.all)
        return result.out

    def _sample(self, runs: Sequence[slice]) -> tuple[list[slice], int]:
        """Tiles of queries, evenly spread, and how many there are in all. Every step and block looks elsewhere.

        Only the last may be ragged.
        """
        size = self._check.order.tiles.queries
        tiles = [slice(n, min(n + size, run.stop)) for run in runs for n in range(run.start, run.stop, size)]
        last, total = tiles[-1:] if tiles[-1].stop - tiles[-1].start < size else [], len(tiles)
        tiles = [tile for tile in tiles if tile.stop - tile.start == size] + last
        count, (context, index) = min(SAMPLED, len(tiles)), self._place
        shift = (self._check.step + _GOLDEN * (index + context)) * _GOLDEN % 1
        return [tiles[int((n + shift) * len(tiles) / count)] for n in range(count)], total


class _Measure:
    """Errors of a sample of queries at given levels, against what all keys make of them.

    count: of all tiles, of which the sample is a part.
    """

    def __init__(self, keys: TiledKeys, q: Tensor, starts: list[int], wanted: Tensor, count: int) -> None:
        self._keys, self._q, self._starts, self._wanted, self._count = keys, q, starts, wanted, count
        self._sizes = self._squares(wanted)
        self._size = self._sizes.sum(0).clamp_min(torch.finfo(torch.float32).tiny)

    def sparsest(self, bound: float) -> Tensor:
        """The level of each head that keeps least within the bound, int8 [heads]; 0 if it skips nothing there."""
        low = torch.zeros(self._keys.heads, dtype=torch.int8)
        high, skips = torch.full_like(low, len(SHARES) - 1), torch.zeros_like(low, dtype=torch.bool)
        while (low < high).any():  # each head halves the range of its own
            middle = (low + high + 1) // 2
            errors, reads_all = self.errors(middle)
            good = errors <= bound
            skips = torch.where(good & (middle > low), ~reads_all, skips)
            low = torch.where(good, middle, low)
            high = torch.where(good, high, middle - 1).maximum(low)
        return low * skips

    def errors(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """How large the relative error of each head may be, float32 [heads], and whether it reads all keys.

        On the host. The more tiles differ and the fewer of them are in the sample, the larger it may be: the standard
        error of a ratio counts (Cochran, Sampling Techniques, 6.4), twice.
        """
        made = self._keys.attend(self._q, self._starts, shares_at(levels, self._q), torch.float32)
        off = self._squares(_by_head(made.out, self._keys) - self._wanted)
        error, seen = off.sum(0) / self._size, len(self._starts)
        if 1 < seen < self._count:
            rest = (off - error * self._sizes).square().sum(0) * seen / (seen - 1) * (1 - seen / self._count)
            error = error + _DOUBT * rest.sqrt() / self._size
        return torch.where(levels == 0, 0.0, error.sqrt().cpu()), made.read.cpu() >= made.all

    def _squares(self, x: Tensor) -> Tensor:
        """Sums of the squares of [rows, heads, 128] for each tile and head, [tiles, heads]."""
        sums = x.square().sum(2)
        whole = len(self._starts) * self._keys.tiles.queries
        return pad(sums, (0, 0, 0, whole - len(sums))).view(len(self._starts), -1, sums.shape[1]).sum(1)


def shares_at(levels: Tensor, q: Tensor) -> Tensor:
    """The share of probability that each head keeps at its level, float32 [heads], where q is."""
    return torch.tensor(SHARES)[levels.long()].to(q.device)


def _by_head(x: Tensor, keys: TiledKeys) -> Tensor:
    split: Tensor = x.unflatten(1, (keys.heads, -1))
    return split
