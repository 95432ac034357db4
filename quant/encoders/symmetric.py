"""Encoders of types with value = scale * code, where a scale is one float16 per block, or d * sub-scale per group.

Level one fits a scale to each group: it rounds x / s to codes q for several s, computes the least-squares scale of
those codes, sum(w x q) / sum(w q q), and keeps the one with the least squared error. Level two fits the float16 d and
the integer sub-scales of a block to these scales in the same way, tries the two nearest sub-scales of each group with
weights rounded again, and fits d again. Errors are weighted by importance.

All operations write to buffers of the workspace, and choices are lerps by masks of 0.0 and 1.0: on a CPU, new memory
and boolean masks would take several times as long as the search.
"""

from collections.abc import Callable
from functools import partial
from math import inf
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from skyrun.quant.encoders.pack_symmetric import pack_q3_k, pack_q4_0, pack_q5_0, pack_q6_k
from skyrun.quant.encoders.tiles import Workspace, in_tiles

# Weights in a tile. On a CPU its buffers fit into the last-level cache, and calls take little time compared to their
# work. On other devices calls cost more than memory.
_CPU_TILE, _TILE = 1 << 19, 1 << 22
_TINY = 1e-15  # a group whose largest magnitude is below this is zero, as in ggml
_HALF = torch.finfo(torch.float16).max


class Grid(Protocol):
    """The values that codes stand for."""

    def nearest(self, x: Tensor, reach: float, space: Workspace) -> Tensor:
        """Round x in place to the grid. reach: a bound for the magnitude of x."""

    def code(self, x: Tensor, space: Workspace) -> Tensor:
        """Values of the grid -> uint8 codes, counted from its lowest value."""


class Integers(NamedTuple):
    """The integers from low to high."""

    low: int
    high: int

    def nearest(self, x: Tensor, reach: float, space: Workspace) -> Tensor:
        """Round x in place to the grid. reach: a bound for the magnitude of x."""
        x.round_()
        return x if reach < self.high + 0.5 else x.clamp_(self.low, self.high)

    def code(self, x: Tensor, space: Workspace) -> Tensor:
        """Values of the grid -> uint8 codes. Only conversion to int8 is fast; the subtraction wraps around."""
        signed = space(f"signed {x.ndim}", *x.shape, dtype=torch.int8).copy_(x)
        return signed.view(torch.uint8).sub_(self.low % 256)


class Symmetric(NamedTuple):
    """A type and its search. A start is the value that a group's weight of largest magnitude is scaled to.

    Together the starts leave the least error on normal, Student-t and low-rank weights; they were found by adding and
    exchanging one at a time. With importance a wider range is searched: the largest weight may be clipped if others
    matter more.
    """

    width: int  # weights in a group
    groups: int  # groups in a block
    grid: Grid
    starts: tuple[float, ...]
    weighted_starts: tuple[float, ...]
    pack: Callable[[Tensor, Tensor, Tensor, Workspace], Tensor]  # (codes, sub-scales, d, space) -> [block_bytes, n]
    scale_grid: Grid | None = None  # of sub-scales
    scale_starts: tuple[float, ...] = ()  # starts for the sub-scales: for a block's scale of largest magnitude


class _Tile(NamedTuple):
    type: Symmetric
    x: Tensor  # [groups, width, n]
    w: Tensor | None  # importance
    wx: Tensor
    space: Workspace

    def round(self, inverse: Tensor, reach: float = inf) -> Tensor:
        """x * inverse rounded to the grid. inverse: [groups, n]. reach: a bound for the magnitude of x * inverse."""
        codes = torch.mul(self.x, inverse.unsqueeze(1), out=self.space("codes", *self.x.shape))
        return self.type.grid.nearest(codes, reach, self.space)

    def moments(self, inverse: Tensor, reach: float = inf) -> tuple[Tensor, Tensor]:
        """sum(w x q) and sum(w q q) of every group, [groups, n] each, for the codes q of an inverse scale."""
        q, product = self.round(inverse, reach), self.space("product", *self.x.shape)
        along, square = (self.space(name, *inverse.shape) for name in ("along", "square"))
        torch.sum(torch.mul(self.wx, q, out=product), 1, out=along)
        q.mul_(q)
        if self.w is not None:
            q.mul_(self.w)
        return along, torch.sum(q, 1, out=square)


class _Best:
    """Keeps the candidate with the most gain for every element. It begins with zeros, whose gain is 0."""

    def __init__(self, space: Workspace, name: str, shape: tuple[int, ...], count: int) -> None:
        self._mask = space(f"{name} mask", *shape)
        self._gain = space(f"{name} gain", *shape).zero_()
        self.values = tuple(space(f"{name} {k}", *shape).zero_() for k in range(count))

    def offer(self, gain: Tensor, *candidate: Tensor) -> None:
        """Take the candidate where its gain is higher. Ties keep the older one: an average would fit neither."""
        torch.gt(gain, self._gain, out=self._mask)
        torch.maximum(gain, self._gain, out=self._gain)
        for value, new in zip(self.values, candidate, strict=True):
            value.lerp_(new, self._mask)


def _reciprocal(x: Tensor, name: str, space: Workspace) -> Tensor:
    """1 / x, or 0 where x is 0."""
    zero = torch.eq(x, 0, out=space("zero", *x.shape))
    return torch.add(x, zero, out=space(name, *x.shape)).reciprocal_().sub_(zero)


def _inverse_peak(x: Tensor, dim: int, space: Workspace) -> Tensor:
    """The reciprocal of the value of largest magnitude along dim, with its sign; 0 if that value is tiny."""
    shape = x.select(dim, 0).shape
    high, low, magnitude, mask = (space(f"peak {k}", *shape) for k in range(4))
    torch.amax(x, dim, out=high)
    torch.amin(x, dim, out=low)
    torch.gt(torch.neg(low, out=magnitude), high, out=mask)
    high.lerp_(low, mask)
    high.mul_(torch.ge(torch.abs(high, out=magnitude), _TINY, out=mask))
    return _reciprocal(high, "inverse peak", space)


def _least_squares(along: Tensor, square: Tensor, name: str, space: Workspace) -> Tensor:
    """along / square, the least-squares scale. If there is nothing to fit, both are 0 and so is the scale."""
    return torch.div(along, torch.add(square, 1e-30, out=space("gain", *square.shape)), out=space(name, *square.shape))


def _gain(scale: Tensor, along: Tensor, square: Tensor, space: Workspace) -> Tensor:
    """How much lower the squared error is than with zeros: scale * (2 along - scale * square)."""
    gain = torch.mul(scale, square, out=space("gain", *scale.shape))
    return torch.sub(along, gain, out=gain).add_(along).mul_(scale)


def _fit_groups(tile: _Tile) -> tuple[Tensor, Tensor]:
    """The best scale of every group, and the curvature of its error at that scale, both [groups, n]."""
    space = tile.space
    inverse_peak = _inverse_peak(tile.x, 1, space)
    best = _Best(space, "group", inverse_peak.shape, 2)
    for start in tile.type.starts if tile.w is None else tile.type.weighted_starts:
        inverse = torch.mul(inverse_peak, start, out=space("inverse", *inverse_peak.shape))
        along, square = tile.moments(inverse, abs(start))
        scale = _least_squares(along, square, "scale", space)
        if tile.type.scale_grid is None:
            _to_half(scale, space)
        best.offer(_gain(scale, along, square, space), scale, square)
    scale, curvature = best.values
    return scale, curvature


def _to_half(d: Tensor, space: Workspace) -> Tensor:
    """Round d in place to finite float16 values."""
    return d.copy_(space("half", *d.shape, dtype=torch.float16).copy_(d.clamp_(-_HALF, _HALF)))


def _fit_d(sub: Tensor, along: Tensor, square: Tensor, space: Workspace) -> tuple[Tensor, Tensor]:
    """The least-squares d [..., n] in float16 for sub-scales [..., groups, n] and the groups' moments, and its gain."""
    product, shape = space("sub product", *sub.shape), (*sub.shape[:-2], sub.shape[-1])
    d_along, d_square = (space(name, *shape) for name in ("d along", "d square"))
    torch.sum(torch.mul(sub, along, out=product), -2, out=d_along)
    torch.sum(torch.mul(sub, sub, out=product).mul_(square), -2, out=d_square)
    d = _to_half(_least_squares(d_along, d_square, "d", space), space)
    return d, _gain(d, d_along, d_square, space)


def _fit_block(tile: _Tile, scale: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """The float16 d [n] and the sub-scales [groups, n] for the best scales of the groups."""
    type, space, (groups, n) = tile.type, tile.space, scale.shape
    assert type.scale_grid is not None
    inverse_peak = _inverse_peak(scale, 0, space)
    inverses = space("inverse", len(type.scale_starts), n)
    for inverse, start in zip(inverses, type.scale_starts, strict=True):
        torch.mul(inverse_peak, start, out=inverse)
    subs = torch.mul(scale, inverses.unsqueeze(1), out=space("subs", len(inverses), groups, n))
    slope = torch.mul(scale, curvature, out=space("slope", groups, n))
    ds, gains = _fit_d(type.scale_grid.nearest(subs, inf, space), slope, curvature, space)
    best_d = _Best(space, "block", (n,), 1)
    for d, gain in zip(ds, gains, strict=True):
        best_d.offer(gain, d)
    (d,) = best_d.values

    # To find out which of the two sub-scales around scale / d is better, the weights are rounded with both.
    ratio = torch.mul(scale, _reciprocal(d, "inverse", space), out=scale).floor_()
    best = _Best(space, "sub", (groups, n), 3)
    for step in (0, 1):
        sub = type.scale_grid.nearest(torch.add(ratio, step, out=space("near", groups, n)), inf, space)
        step_size = torch.mul(sub, d, out=space("scale", groups, n))
        along, square = tile.moments(_reciprocal(step_size, "inverse", space))
        best.offer(_gain(step_size, along, square, space), sub, along, square)
    sub, along, square = best.values
    return _fit_d(sub, along, square, space)[0], sub


def _encode_tile(type: Symmetric, x: Tensor, w: Tensor | None, space: Workspace) -> Tensor:
    x = x.view(type.groups, type.width, -1)
    wx = x
    if w is not None:
        w = w.view_as(x)
        wx = torch.mul(x, w, out=space("wx", *x.shape))
    tile = _Tile(type, x, w, wx, space)
    scale, curvature = _fit_groups(tile)
    if type.scale_grid is None:
        d = sub = scale
    else:
        d, sub = _fit_block(tile, scale, curvature)
        torch.mul(sub, d, out=scale)
    codes = type.grid.code(tile.round(_reciprocal(scale, "inverse", space)), space).view(-1, x.shape[2])
    subs = codes if type.scale_grid is None else type.scale_grid.code(sub, space)
    return type.pack(codes, subs, d.view(-1), space).T.contiguous()


def encode_symmetric(type: Symmetric, x: Tensor, importance: Tensor | None) -> Tensor:
    """float32 [n, block_size] -> uint8 [n, block_bytes]; importance as in quant/encoders/encode.py."""
    weights = _CPU_TILE if x.device.type == "cpu" else _TILE
    return in_tiles(x, importance, weights // (type.groups * type.width), partial(_encode_tile, type))


Q4_0 = Symmetric(
    *(32, 1, Integers(-8, 7)),
    starts=(-6.9, -7.24, -7.81, -8.03, -8.37, -8.71),
    weighted_starts=(-6.16, -7.16, -7.96, -8.46, -9.12, -10.8, -15.3, 8.96),
    pack=pack_q4_0,
)
Q5_0 = Symmetric(
    *(32, 1, Integers(-16, 15)),
    starts=(-14.03, -14.71, -15.16, -15.84, -16.06, -16.51),
    weighted_starts=(-12.9, -13.9, -15.1, -16.06, -16.55, -17.5, -19.9, -23.6, -33.4),
    pack=pack_q5_0,
)
Q3_K = Symmetric(
    *(16, 16, Integers(-4, 3)),
    starts=(-3.11, -3.85, -4.3, -4.69),
    weighted_starts=(-3.18, -3.98, -4.56, -5.91, -9.91, 4.43, 6.44),
    pack=pack_q3_k,
    scale_grid=Integers(-32, 31),
    scale_starts=(-28, -29.1, -30.2, -31.3, -32.4),
)
Q6_K = Symmetric(
    *(16, 16, Integers(-32, 31)),
    starts=(-28.06, -28.96, -29.87, -31.22, -32.12),
    weighted_starts=(-25.04, -27.84, -29.84, -31.04, -32.24),
    pack=pack_q6_k,
    scale_grid=Integers(-128, 127),
    scale_starts=(-116, -119, -122, -125, -128.4),
)
