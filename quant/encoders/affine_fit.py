"""Least squares fits for groups of weights: value = scale * code - minimum, with codes from 0 to a maximum.

As in ggml's make_qkx3_quants, a group's weights are rounded several times with different scales, each rounding gets the
scale and minimum that fit it best, and the best of these fits is kept. ggml varies the scale only; here the minimum is
varied too (see Starts).

Tensors of weights are [tiles, groups, width, n], tensors of groups [tiles, groups, n], with n blocks side by side (see
tiles.py). Operations on all weights write to buffers of one tile, which stay in the cache. Masks are float tensors of
zeros and ones that control a lerp: on CPUs, selecting by boolean tensors is ten times slower in torch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from skyrun.quant.encoders.tiles import Workspace

_TINY = 1e-15  # a group whose range is below this is zero, as in ggml
_FLAT = 1e-6  # codes whose variance is below this share of their squares determine no slope
_FIELD = 2048.0  # larger than a sum of 32 centred codes; times a sum of their squares, at most 2^13, it is still exact
ENDLESS = 2.0**27  # replaces the step of a group with scale 0: every code becomes 0, and every error stays exact

Sums = tuple[Tensor, Tensor, Tensor]  # sums of code, code^2 and code * x over each group


class Groups(NamedTuple):
    """Groups of weights with the statistics that fits need; these are computed once."""

    x: Tensor  # [tiles, groups, width, n]
    weight: Tensor | None  # of the same shape: how much each error counts
    weighted: Tensor  # x * weight
    weight_sum: Tensor  # over each group, [tiles, groups, n]
    x_sum: Tensor  # of `weighted` over each group
    mean: Tensor
    low: Tensor
    high: Tensor
    max_code: int

    @property
    def centre(self) -> int:
        return (self.max_code + 1) // 2


class Fit(NamedTuple):
    """Scale and minimum per group, [tiles, groups, n]."""

    scale: Tensor
    minimum: Tensor  # is subtracted
    gain: Tensor  # how much lower the squared error is than if every weight were coded by the mean
    mean_code: Tensor  # derivative of the best minimum with respect to the scale
    curvature: Tensor  # the error grows by this times the square of a change of the scale, if the minimum follows


class Starts(NamedTuple):
    """The roundings that a search starts with.

    A clip is how many code steps of a group's range are cut off at the bottom and at the top. Clipping one side and
    stretching the other explores the direction in which scale and minimum compensate each other, where the error is
    flat and better fits are found.
    """

    clips: tuple[tuple[float, float], ...]
    aligned: tuple[float, ...] = ()  # the total of both clips, with one code at exactly zero: for sparse weights


def above(a: Tensor, b: Tensor) -> Tensor:
    """1.0 where a > b, else 0.0."""
    return torch.gt(a, b, out=torch.empty_like(a))


def describe(x: Tensor, weight: Tensor | None, low: Tensor, high: Tensor, max_code: int, space: Workspace) -> Groups:
    """The statistics of weights [tiles, groups, width, n] whose extremes are `low` and `high`."""
    if weight is None:
        weighted, x_sum = x, x.sum(2)
        weight_sum = torch.full_like(x_sum, x.shape[2])
    else:
        weighted = torch.mul(x, weight, out=space("weighted", *x.shape))
        x_sum, weight_sum = weighted.sum(2), weight.sum(2)
    return Groups(x, weight, weighted, weight_sum, x_sum, x_sum / weight_sum, low, high, max_code)


def encode_tile(x: Tensor, inverse: Tensor, bias: Tensor, low: float, high: float, out: Tensor) -> Tensor:
    """The codes of one tile [groups, width, n], with inverse scales and biases [groups, 1, n]."""
    return torch.addcmul(bias, x, inverse, out=out).round_().clamp_(low, high)


def moments(g: Groups, inverse: Tensor, bias: Tensor, space: Workspace) -> Sums:
    """Sums of code, code^2 and code * x over each group, for each of k roundings: [k, tiles, groups, n] each.

    inverse, bias: [k, tiles, groups, n], with code = round(x * inverse + bias). Codes are centred (they begin at
    -centre), so that their sum and the sum of their squares fit into one float32.
    """
    low, high = float(-g.centre), float(g.max_code - g.centre)
    code, work = space("code", *g.x.shape[1:]), space("work", *g.x.shape[1:])
    first, second, along = (space(name, *inverse.shape) for name in ("first", "second", "along"))
    inverse, bias = inverse.unsqueeze(3), bias.unsqueeze(3)
    for t, x in enumerate(g.x):
        weighted = g.weighted[t]
        weight = None if g.weight is None else g.weight[t]
        for k in range(len(inverse)):
            encode_tile(x, inverse[k, t], bias[k, t], low, high, code)
            torch.sum(torch.mul(code, weighted, out=work), 1, out=along[k, t])
            if weight is None:
                torch.sum(torch.addcmul(code, code, code, value=_FIELD, out=work), 1, out=second[k, t])
            else:
                torch.sum(torch.mul(code, weight, out=work), 1, out=first[k, t])
                torch.sum(work.mul_(code), 1, out=second[k, t])
    if g.weight is None:
        torch.mul(second, 1 / _FIELD, out=first).round_()
        second.sub_(first, alpha=_FIELD)
        first, second = second, first
    return first, second, along


def from_zero(g: Groups, sums: Sums) -> Sums:
    """Convert `moments` of centred codes, in place, to those of codes that begin at 0."""
    first, second, along = sums
    second.add_(first, alpha=2 * g.centre).add_(g.weight_sum, alpha=g.centre**2)
    return first.add_(g.weight_sum, alpha=g.centre), second, along.add_(g.x_sum, alpha=g.centre)


def least_squares(g: Groups, sums: Sums, signed: bool) -> Fit:
    """The best scale and minimum for codes with these `moments`, which are overwritten.

    signed: whether the minimum may be below 0.
    """
    first, second, along = sums
    mean_code = first / g.weight_sum
    curvature = torch.addcmul(second, first, mean_code, value=-1)
    moment = torch.addcmul(along, first, g.mean, value=-1)
    scratch, square, inner = from_zero(g, sums)
    mean_code.add_(g.centre)
    steep = torch.gt(curvature, torch.mul(square, _FLAT, out=scratch), out=scratch)
    curvature.clamp_min_(_TINY**2)
    scale = torch.mul(steep, moment).div_(curvature)
    gain = moment.mul_(scale)
    minimum = torch.mul(scale, mean_code).sub_(g.mean)
    if not signed:
        # A minimum below zero cannot be stored, so the best line through zero is used instead.
        negative = torch.lt(minimum, 0, out=scratch)
        slope = torch.div(inner, square.clamp_min_(_TINY**2)).clamp_min_(0)
        scale.lerp_(slope, negative)
        gain.lerp_(slope.mul_(inner).addcmul_(g.mean, g.x_sum, value=-1), negative)
        curvature.lerp_(square, negative)
        minimum.clamp_min_(0)
    return Fit(scale, minimum, gain, mean_code, curvature)


def _better(fit: Fit, new: Fit) -> Fit:
    mask = above(new.gain, fit.gain)
    return Fit(*(old.lerp_(candidate, mask) for old, candidate in zip(fit, new, strict=True)))


def fit_groups(g: Groups, starts: Starts, signed: bool, space: Workspace, rounds: int = 0) -> Fit:
    """The best fit of all starts for every group, which is then `rounds` times rounded and fitted again."""
    span = (g.high - g.low).clamp_min_(_TINY)
    clips = (*starts.clips, *((clip / 2, clip / 2) for clip in starts.aligned))
    inverse, bias = (space(name, len(clips), *span.shape) for name in ("inverse", "bias"))
    for k, (bottom, top) in enumerate(clips):
        stretch = 1 / (1 - (bottom + top) / g.max_code)
        torch.mul(span.reciprocal(), g.max_code * stretch, out=inverse[k])
        torch.mul(g.low, inverse[k], out=bias[k]).neg_().sub_(bottom * stretch + g.centre)
    bias[len(starts.clips) :].round_()
    sums = moments(g, inverse, bias, space)
    best, *others = (least_squares(g, of_start, signed) for of_start in zip(*sums, strict=True))
    for fit in others:
        best = _better(best, fit)
    for _ in range(rounds):
        inverse = best.scale.clamp_min(_TINY).reciprocal_()
        first, second, along = moments(g, inverse[None], (best.minimum * inverse - g.centre)[None], space)
        best = _better(best, least_squares(g, (first[0], second[0], along[0]), signed))
    return best
