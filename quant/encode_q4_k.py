"""Q4_K: 256 weights as eight groups of 32, value = d * scale * code - dmin * min, with 6-bit scales and mins.

Two levels of search. Level one fits scale and min of each group by least squares from several roundings of its codes;
level two finds the float16 pair (d, dmin) that all eight groups of a block share. Errors are weighted by importance.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_GROUPS, _WIDTH, _MAX_CODE, _MAX_SCALE = 8, 32, 15, 63
_TINY = 1e-15  # a group whose range is below this is zero, as in ggml

# Code steps to clip at the bottom and at the top of a group's range. Clipping on one side and stretching on the other
# explores the direction in which scale and min trade off, where the error is flat and a better fit hides.
_STARTS = ((0.1, 0.1), (0.3, 0.0), (-0.2, 0.5), (0.5, -0.1), (0.0, 0.3))
_SUPER_STARTS = 8


class _Fit(NamedTuple):
    scale: Tensor  # [n, 8]
    minimum: Tensor  # [n, 8], subtracted
    gain: Tensor  # [n, 8], error removed
    mean_code: Tensor  # [n, 8], weighted mean of the codes: how the best min follows a change of the scale
    curvature: Tensor  # [n, 8], how much a change of the scale costs once the min has followed


def _reciprocal(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0."""
    return torch.where(x == 0, 0.0, 1 / x)


def _least_squares(x: Tensor, w: Tensor, code: Tensor) -> _Fit:
    """Best scale and non-negative min for given codes. x, w, code: [n, 8, 32]."""
    sum_w, sum_wx = w.sum(2), (w * x).sum(2)
    wq = w * code
    sum_wq, sum_wqq, sum_wqx = wq.sum(2), (wq * code).sum(2), (wq * x).sum(2)
    mean_code, mean_x = sum_wq / sum_w, sum_wx / sum_w
    curvature = sum_wqq - sum_wq * mean_code
    moment = sum_wqx - sum_wq * mean_x
    scale = moment * _reciprocal(curvature)
    minimum = mean_code * scale - mean_x
    # Where the codes do not vary there is no slope to fit: a constant below zero is all min, any other all scale. A
    # negative min cannot be stored either: then the line goes through zero.
    flat = curvature <= 1e-5 * sum_wqq
    constant = flat & (mean_x < 0)
    through_zero = (flat | (minimum < 0)) & ~constant
    slope = (sum_wqx * _reciprocal(sum_wqq)).clamp_min(0)

    def pick(line: Tensor, zero: Tensor | float, level: Tensor | float) -> Tensor:
        return torch.where(constant, level, torch.where(through_zero, zero, line))

    return _Fit(
        pick(scale, slope, 0.0),
        pick(minimum, 0.0, -mean_x),
        pick(scale * moment + mean_x * sum_wx, slope * sum_wqx, mean_x * sum_wx),
        mean_code,
        pick(curvature, sum_wqq, sum_wqq),
    )


def _fit_groups(x: Tensor, w: Tensor) -> _Fit:
    """The best of all starts for every group. x, w: [n, 8, 32]."""
    low = x.amin(2, keepdim=True).clamp_max(0)
    span = x.amax(2, keepdim=True) - low
    inverse_span = torch.where(span < _TINY, 0.0, 1 / span)
    best: _Fit | None = None
    for bottom, top in _STARTS:
        stretch = 1 / (1 - (bottom + top) / _MAX_CODE)
        code = ((x - low) * (_MAX_CODE * stretch * inverse_span) - bottom * stretch).round_().clamp_(0, _MAX_CODE)
        fit = _least_squares(x, w, code)
        if best is None:
            best = fit
        else:
            better = fit.gain > best.gain
            best = _Fit(*(torch.where(better, new, old) for new, old in zip(fit, best, strict=True)))
    assert best is not None
    return best


def _super_scale(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float16 d [n, 1] and codes [n, 8] so that d * code is nearest to `values` [n, 8], weighted."""
    top = values.amax(1, keepdim=True)
    best_d = torch.zeros_like(top)
    best_score = torch.full_like(top, -torch.inf)
    for shift in torch.linspace(-0.3 * _MAX_SCALE, 0.5, _SUPER_STARTS).tolist():
        code = (values * ((_MAX_SCALE + shift) * _reciprocal(top))).round_().clamp_(0, _MAX_SCALE)
        along, square = (weight * values * code).sum(1, keepdim=True), (weight * code * code).sum(1, keepdim=True)
        d = (along * _reciprocal(square)).clamp_max_(65504).half().float()
        score = d * (2 * along - d * square)
        better = score > best_score
        best_d = torch.where(better, d, best_d)
        best_score = torch.where(better, score, best_score)
    return best_d, (values * _reciprocal(best_d)).round_().clamp_(0, _MAX_SCALE)


def _mirror(x: Tensor) -> Tensor:
    """+1 or -1 per block [n, 1, 1]: which sign of the block wastes less of the codes on its offset.

    Values start at or below zero, so a block far from zero on the positive side would spend codes on nothing; its
    negative has a min instead. d and dmin are signed, so storing both negated undoes it.
    """
    high, low = x.amax(2), x.amin(2)

    def cost(high: Tensor, low: Tensor) -> Tensor:
        offset = (-low).clamp_min(0)
        span = high + offset
        codes = (span / _MAX_CODE).square().mean(1)
        scales = (offset.amax(1) / _MAX_SCALE).square() + (span.amax(1) / _MAX_SCALE).square() / 12
        return codes + scales

    return torch.where(cost(high, low) <= cost(-low, -high), 1.0, -1.0).view(-1, 1, 1)


def _pack(d: Tensor, dmin: Tensor, scale: Tensor, minimum: Tensor, code: Tensor) -> Tensor:
    """ggml's block_q4_K: d, dmin, twelve bytes of 6-bit scales and mins, 128 bytes of codes."""
    scale, minimum, code = (t.to(torch.uint8) for t in (scale, minimum, code))
    packed = torch.cat(
        (
            scale[:, :4] | ((scale[:, 4:] >> 4) << 6),
            minimum[:, :4] | ((minimum[:, 4:] >> 4) << 6),
            (scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << 4),
        ),
        1,
    )
    pairs = code.view(-1, 4, 2, 32)
    codes = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)
    header = torch.cat((d, dmin), 1).half().contiguous().view(torch.uint8)
    return torch.cat((header, packed, codes), 1)


def encode_q4_k(x: Tensor, importance: Tensor | None) -> Tensor:
    """float32 [n, 256] -> uint8 [n, 144]."""
    x = x.view(-1, _GROUPS, _WIDTH)
    w = x.new_ones(()).expand_as(x)
    if importance is not None:
        w = importance.repeat(-(-len(x) // len(importance)), 1)[: len(x)].view_as(x)
    sign = _mirror(x)
    x = x * sign
    fit = _fit_groups(x, w)
    d, scale = _super_scale(fit.scale, fit.curvature)
    minimum = (fit.minimum + fit.mean_code * (d * scale - fit.scale)).clamp_min(0)
    dmin, minimum = _super_scale(minimum, w.sum(2))
    step, offset = (d * scale).unsqueeze(2), (dmin * minimum).unsqueeze(2)
    code = ((x + offset) * _reciprocal(step)).round_().clamp_(0, _MAX_CODE)
    sign = sign.view(-1, 1)
    return _pack(d * sign, dmin * sign, scale, minimum, code)
