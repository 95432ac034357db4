"""Attention that skips what does not matter, as far as an error allows that is measured on the run at hand.

The first step of a window is dense. On a sample of query tiles it learns, for each block and head, what keeping less of
the probability would have cost: the relative error of the output, against all keys in the same precision. A head keeps
the least whose error stays under the bound, or all if nothing does. Every later step looks at other queries before it
attends, and heads that are off by more than the bound keep more from then on.

Of several devices each decides for its heads, from the same sample of the tokens of all; after a step all know it all.
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
from skyrun.parallel.group import here

# Of the probability that means of tiles promise, what is kept; the first keeps all.
SHARES = (1.0, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.45, 0.3)
SAMPLED = 12  # tiles of queries that are looked at in a step
_MARGIN = 0.95  # of the bound, what a sample may reach
_DOUBT = 2.0  # standard errors of a sample that count as error
_GOLDEN = (math.sqrt(5) - 1) / 2

Queries = Callable[[Sequence[slice]], Tensor]  # the queries of ranges of tokens, one after the other


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
    """The attention of a window's blocks, and what it may skip. Levels and errors are those of the heads of this rank.

    Args:
        bound: relative error that the output of a head may have.
        order: of the tokens.
        shape: contexts, blocks and heads of the model.
        learned: what earlier steps have learned.
    """

    def __init__(self, bound: float, order: TileOrder, shape: tuple[int, int, int], learned: Learned) -> None:
        self.bound, self.order = bound, order
        self._shape, self._learned, self._group = shape, learned, here()
        self._heads_of = self._group.shares(shape[2])
        self._begin()

    def _begin(self) -> None:
        known = self._learned.levels
        self.learns = known is None
        self.before = (torch.zeros(self._shape, dtype=torch.int8) if known is None else known)[..., self._own]
        self.levels = self.before.clone()
        self.errors = torch.zeros(self.levels.shape)
        self.read: dict[tuple[int, int], dict[int, tuple[Tensor, int]]] = {}

    @property
    def _own(self) -> slice:
        """The heads of this rank."""
        return self._heads_of[self._group.rank]

    @property
    def step(self) -> int:
        """How many steps of the run are done."""
        return 0 if self._learned.steps is None else len(self._learned.steps)

    def may_skip(self, place: tuple[int, int]) -> bool:
        """Whether any head of any rank skips something at a context and block, as far as is known before the step."""
        known = self._learned.levels
        return known is None or bool(known[place].any())

    def tiles(self, runs: Sequence[slice]) -> list[slice]:
        """Tiles of queries of all tokens, which are in ranges that have a time each."""
        size = self.order.tiles.queries
        return [slice(n, min(n + size, run.stop)) for run in runs for n in range(run.start, run.stop, size)]

    def shares(self, runs: Sequence[slice]) -> list[slice]:
        """The tokens of each rank: whole tiles, so that these do not depend on how many ranks there are."""
        tiles = self.tiles(runs)
        edges = [*(tile.start for tile in tiles), tiles[-1].stop]
        return [slice(edges[share.start], edges[share.stop]) for share in self._group.shares(len(tiles))]

    def whole_tiles(self, rows: int | None) -> int | None:
        """At least so many tokens that pass through a block at a time, so that tiles of queries are whole."""
        size = self.order.tiles.queries
        return rows and -(-rows // size) * size

    def block(self, context: int, index: int, runs: Sequence[slice]) -> "BlockCheck":
        """The attention of a block with one of the contexts. runs: ranges of tokens that have a time each."""
        return BlockCheck(self, context, index, runs)

    def finish_step(self) -> tuple[Learned, tuple[Attended, ...]]:
        """What is known after a step, and the events that say so."""
        contexts, blocks, heads = self._shape
        levels, errors, densities = self._of_all_heads()
        density = densities.mean((0, 2)).float()
        dense = torch.ones(blocks) if self.learns else (levels == 0).float().mean((0, 2))
        error = torch.full((blocks,), -1.0) if self.learns else errors.float().amax((0, 2))
        row = torch.stack((density, error, dense), 1).unsqueeze(0)
        before = self._learned.steps
        self._learned = Learned(levels.to(torch.int8), row if before is None else torch.cat((before, row)))
        event = Attended(
            density=float(density.mean()),
            error=float(error.max().clamp_min(0)),
            dense_heads=int((levels == 0).sum()) if not self.learns else contexts * blocks * heads,
            heads=contexts * blocks * heads,
            densities=tuple(density.tolist()),
            errors=tuple(error.clamp_min(0).tolist()),
        )
        self._begin()
        return self._learned, (event,)

    def _of_all_heads(self) -> Tensor:
        """Levels, errors and densities of the heads of all ranks, on all of them: float64 [3, contexts, blocks, H]."""
        densities = torch.ones(self.levels.shape, dtype=torch.float64)
        for place, parts in self.read.items():
            read = torch.stack([read for read, _ in parts.values()]).sum(0)
            densities[place] = read.cpu().double() / sum(whole for _, whole in parts.values())
        own = torch.stack((self.levels.double(), self.errors.double(), densities)).movedim(3, 0).contiguous()
        counts = [heads.stop - heads.start for heads in self._heads_of]
        return self._group.gathered(own.to(self._group.device), counts).cpu().movedim(0, 3)


class AllToAll:
    """The self-attention of one block in one step: as the base of others, one that skips nothing."""

    def keys(self, k: Tensor | KeyRoom, v: Tensor | PassingValues, heads: int, precision: str) -> Keys | TiledKeys:
        """Keys and values [L, heads * d], which are handed over."""
        return Keys(k, v, heads, precision)

    def look(self, keys: Keys | TiledKeys, queries: Queries) -> None:
        """Decide what is skipped, before anything attends.

        Args:
            keys: of all tokens.
            queries: makes those of some tiles, with the heads that the keys have.
        """

    def attend(self, keys: Keys | TiledKeys, q: Tensor, ranges: Sequence[slice]) -> Tensor:
        """Attend from queries [n, heads * d] of ranges of tokens, each of which begins with a tile and has one time."""
        assert isinstance(keys, Keys)
        return attend(q, keys)


class BlockCheck(AllToAll):
    """Attention that skips what costs little, as it finds on a sample."""

    def __init__(self, check: SelfCheck, context: int, index: int, runs: Sequence[slice]) -> None:
        self._check, self._place, self._runs = check, (context, index), runs

    @property
    def _levels(self) -> Tensor:
        return self._check.levels[self._place]

    def keys(self, k: Tensor | KeyRoom, v: Tensor | PassingValues, heads: int, precision: str) -> Keys | TiledKeys:
        """As of the base where no head skips anything."""
        if not self._check.may_skip(self._place):
            return super().keys(k, v, heads, precision)
        return TiledKeys(k, v, heads, precision, self._check.order.tiles, self._check.order.always)

    def look(self, keys: Keys | TiledKeys, queries: Queries) -> None:
        """Measure the errors of a sample of queries, and choose what each head keeps."""
        check = self._check
        if isinstance(keys, Keys):
            return
        keys.prepare()
        sample, count = self._sample()
        q = queries(sample)
        starts = [rows.start for rows in sample]
        measure = _Measure(keys, q, starts, count)
        if check.learns:
            self._levels.copy_(measure.sparsest(_MARGIN * check.bound))
            return
        levels = check.before[self._place].clone()
        while True:
            errors, _ = measure.errors(levels)
            over = (errors > _MARGIN * check.bound) & (levels > 0)
            if not over.any():
                break
            levels -= over.to(torch.int8)
        self._levels.copy_(levels)
        check.errors[self._place] = errors

    def attend(self, keys: Keys | TiledKeys, q: Tensor, ranges: Sequence[slice]) -> Tensor:
        """Attend from the queries to the tiles of keys that each of their tiles needs."""
        if isinstance(keys, Keys):
            return super().attend(keys, q, ranges)
        if self._check.learns or not self._levels.any():
            return attend(q, keys.keys)
        shares, out, first = shares_at(self._levels, q), torch.empty_like(q), 0
        for rows in ranges:
            part = slice(first, first + rows.stop - rows.start)
            if starts := list(range(rows.start, rows.stop, keys.tiles.queries)):
                result = keys.attend(q[part], starts, shares, out[part])
                self._check.read.setdefault(self._place, {})[rows.start] = (result.read, result.all)
            first = part.stop
        return out

    def _sample(self) -> tuple[list[slice], int]:
        """Tiles of queries, evenly spread, and how many there are in all. Every step and block looks elsewhere.

        Only the last may be ragged.
        """
        tiles, size = self._check.tiles(self._runs), self._check.order.tiles.queries
        last, total = tiles[-1:] if tiles[-1].stop - tiles[-1].start < size else [], len(tiles)
        tiles = [tile for tile in tiles if tile.stop - tile.start == size] + last
        count, (context, index) = min(SAMPLED, len(tiles)), self._place
        shift = (self._check.step + _GOLDEN * (index + context)) * _GOLDEN % 1
        return [tiles[int((n + shift) * len(tiles) / count)] for n in range(count)], total


class _Measure:
    """Errors of a sample of queries at given levels, against what all keys make of them.

    count: of all tiles, of which the sample is a part.
    """

    def __init__(self, keys: TiledKeys, q: Tensor, starts: list[int], count: int) -> None:
        self._keys, self._q, self._starts, self._count = keys, q, starts, count
        self._wanted = self._read(torch.zeros(keys.heads, dtype=torch.int8))[0]
        self._sizes = self._squares(self._wanted)
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
        found, reads_all = self._read(levels)
        off = self._squares(found - self._wanted)
        error, seen = off.sum(0) / self._size, len(self._starts)
        if 1 < seen < self._count:
            rest = (off - error * self._sizes).square().sum(0) * seen / (seen - 1) * (1 - seen / self._count)
            error = error + _DOUBT * rest.sqrt() / self._size
        return torch.where(levels == 0, 0.0, error.sqrt().cpu()), reads_all

    def _read(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """What queries find at levels of heads, float32 [rows, heads, 128], and whether each reads all keys."""
        out = torch.empty(self._q.shape, dtype=torch.float32, device=self._q.device)
        made = self._keys.attend(self._q, self._starts, shares_at(levels, self._q), out)
        return out.unflatten(1, (self._keys.heads, -1)), made.read.cpu() >= made.all

    def _squares(self, x: Tensor) -> Tensor:
        """Sums of the squares of [rows, heads, 128] for each tile and head, [tiles, heads]."""
        sums = x.square().sum(2)
        whole = len(self._starts) * self._keys.tiles.queries
        return pad(sums, (0, 0, 0, whole - len(sums))).view(len(self._starts), -1, sums.shape[1]).sum(1)


def shares_at(levels: Tensor, q: Tensor) -> Tensor:
    """The share of probability that each head keeps at its level, float32 [heads], where q is."""
    return torch.tensor(SHARES)[levels.long()].to(q.device)
