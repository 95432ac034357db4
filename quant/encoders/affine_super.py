"""Level two of the affine K types: the scales and minima of groups as d * scale code and dmin * minimum code.

Each block has a float16 d and dmin. Tensors of groups are [tiles, groups, n], tensors of blocks [tiles, 1, n].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from skyrun.quant.encoders.affine_fit import ENDLESS, Fit, Groups, above, from_zero, moments
from skyrun.quant.encoders.tiles import Workspace

_HALF_MAX = 65504.0
HALF_TINY = 2.0**-24  # the smallest float16
_TRIALS = 12  # grids that are tried, from the finest that the codes allow to one that is 15 % coarser

# Changes of the codes of (scale, minimum) that are tried. Often both grow together, along the valley in which they
# compensate each other.
Steps = tuple[tuple[int, int], ...]


class Super(NamedTuple):
    """Level two of a batch of blocks."""

    d: Tensor  # [tiles, 1, n], float16 values
    dmin: Tensor
    scale: Tensor  # [tiles, groups, n], integers
    minimum: Tensor

    def step(self) -> Tensor:
        """The distance between the values of neighbouring codes, [tiles, groups, n]."""
        step = self.d * self.scale
        return step.add_(torch.eq(step, 0, out=torch.empty_like(step)), alpha=ENDLESS)

    def rounding(self, centre: int) -> tuple[Tensor, Tensor]:
        """(inverse, bias) such that code = round(x * inverse + bias)."""
        inverse = self.step().reciprocal_()
        return inverse, self.dmin * self.minimum * inverse - centre


def mirror(x: Tensor, low: Tensor, high: Tensor, max_code: int, max_scale: int) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply blocks in place by the sign, [tiles, 1, n], that wastes fewer codes on offsets.

    Ranges of groups must begin at or below zero, so a group of large positive values would waste codes; negated, it has
    a minimum instead. d and dmin are signed, so negating both reverses the sign. Returns the sign and the groups' new
    extremes.
    """

    def cost(low: Tensor, high: Tensor) -> Tensor:
        offset = (-low).clamp_min_(0)
        span = high + offset
        codes = (span / max_code).square_().mean(1, keepdim=True)
        scales = (span.amax(1, keepdim=True) / max_scale).square_() / 12
        return codes + scales + (offset.amax(1, keepdim=True) / max_scale).square_()

    flip = above(cost(low, high), cost(-high, -low))
    sign = 1 - 2 * flip
    x.mul_(sign.unsqueeze(2))
    return sign, low.lerp(-high, flip), high.lerp(-low, flip)


def to_half(x: Tensor) -> Tensor:
    """The nearest finite float16 values, as float32."""
    return x.clamp(-_HALF_MAX, _HALF_MAX).half().float()


def _super_scale(values: Tensor, weight: Tensor, max_scale: int, space: Workspace) -> Tensor:
    """The float16 d [tiles, 1, n] with the least weighted error if `values` [tiles, groups, n] are multiples of it.

    Each trial rounds the values to a grid and fits d to the codes. Trials are scored with d rounded to float16.
    """
    unit = max_scale / values.amax(1, keepdim=True).clamp_min_(max_scale * HALF_TINY)
    weighted = values * weight
    code, work = space("trial", *values.shape), torch.empty_like(values)
    along, square = (space(name, _TRIALS, *unit.shape) for name in ("trial_along", "trial_square"))
    for k, shift in enumerate(torch.linspace(-0.15, 0.5 / max_scale, _TRIALS).tolist()):
        torch.mul(values, unit * (1 + shift), out=code).round_().clamp_(0, max_scale)
        torch.sum(torch.mul(code, weighted, out=work), 1, keepdim=True, out=along[k])
        torch.sum(code.square_().mul_(weight), 1, keepdim=True, out=square[k])
    d = to_half(along / square.clamp_min(1e-30))
    score = along.mul_(2).addcmul_(d, square, value=-1).mul_(d)
    best_d, best_score = d[0], score[0]
    for k in range(1, _TRIALS):
        mask = above(score[k], best_score)
        best_d.lerp_(d[k], mask)
        best_score.lerp_(score[k], mask)
    return best_d


def _codes_of(values: Tensor, d: Tensor, max_scale: int) -> Tensor:
    """The values in units of d, rounded to integers from 0 to max_scale."""
    return (values / d.clamp_min(HALF_TINY)).round_().clamp_(0, max_scale)


def level_two(g: Groups, fit: Fit, max_scale: int, space: Workspace) -> Super:
    """Units and codes for the scales, then for the minima that are best for the rounded scales."""
    d = _super_scale(fit.scale, fit.curvature, max_scale, space)
    scale = _codes_of(fit.scale, d, max_scale)
    minimum = torch.addcmul(fit.minimum, fit.mean_code, d * scale - fit.scale).clamp_min_(0)
    dmin = _super_scale(minimum, g.weight_sum, max_scale, space)
    return Super(d, dmin, scale, _codes_of(minimum, dmin, max_scale))


def _errors(g: Groups, choices: list[Super], space: Workspace) -> list[Tensor]:
    """The weighted squared error of every group [tiles, groups, n], for each choice of level two."""
    roundings = [[part.unsqueeze(2) for part in choice.rounding(0)] for choice in choices]
    errors = list(space("errors", len(choices), *choices[0].scale.shape))
    code, work = space("code", *g.x.shape[1:]), space("work", *g.x.shape[1:])
    for t, x in enumerate(g.x):
        for (inverse, bias), error in zip(roundings, errors, strict=True):
            torch.addcmul(bias[t], x, inverse[t], out=work)
            torch.round(work, out=code).clamp_(0, g.max_code)
            torch.ops.aten.mse_loss.out(work, code, 0, out=work)  # (work - code)^2 in one pass
            if g.weight is not None:
                work.mul_(g.weight[t])
            torch.sum(work, 1, out=error[t])
    return [error.mul_(choice.step().square_()) for choice, error in zip(choices, errors, strict=True)]


def neighbours(g: Groups, found: Super, steps: Steps, max_scale: int, space: Workspace) -> Super:
    """Replace the codes of every group by the best of those that are `steps` away, or keep them."""
    choices = [
        found._replace(
            scale=(found.scale + scale).clamp_(0, max_scale), minimum=(found.minimum + minimum).clamp_(0, max_scale)
        )
        for scale, minimum in ((0, 0), *steps)
    ]
    (least, *errors), (best, *others) = _errors(g, choices, space), choices
    for error, other in zip(errors, others, strict=True):
        mask = above(least, error)
        least.lerp_(error, mask)
        best.scale.lerp_(other.scale, mask)
        best.minimum.lerp_(other.minimum, mask)
    return best


def refit(g: Groups, found: Super, space: Workspace) -> Super:
    """Fit d and dmin of every block to the codes of its groups by least squares, where that lowers the error."""
    inverse, bias = found.rounding(g.centre)
    first, second, along = (part[0] for part in moments(g, inverse[None], bias[None], space))
    first, second, along = from_zero(g, (first, second, along))

    def total(x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)

    s, m = found.scale, found.minimum
    ss, sm, mm = total(s * s * second), total(s * m * first), total(m * m * g.weight_sum)
    sx, mx = total(s * along), total(m * g.x_sum)
    determinant = ss * mm - sm * sm
    solvable = above(determinant, 1e-6 * ss * mm)
    inverse_determinant = solvable / determinant.lerp(torch.ones_like(solvable), 1 - solvable)
    d = to_half((sx * mm - mx * sm) * inverse_determinant)
    dmin = to_half((sx * sm - mx * ss) * inverse_determinant)

    def error(d: Tensor, dmin: Tensor) -> Tensor:
        return d * (d * ss - 2 * dmin * sm - 2 * sx) + dmin * (dmin * mm + 2 * mx)

    # The weights will be rounded to the new grid, which can only lower the error further.
    mask = above(error(found.d, found.dmin), error(d, dmin)) * solvable
    return found._replace(d=found.d.lerp(d, mask), dmin=found.dmin.lerp(dmin, mask))
