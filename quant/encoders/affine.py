"""Encoders of Q2_K, Q4_K, Q5_K and Q4_1, Q5_1, which search for the best value = scale * code - minimum.

Level one fits scale and minimum of each group of weights (affine_fit.py). In the K types the scales and minima are
themselves quantized: level two (affine_super.py) searches their float16 units, tries neighbouring codes, and fits the
units again. Errors are weighted by importance.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from skyrun.quant.encoders import pack_affine as pack
from skyrun.quant.encoders.affine_fit import ENDLESS, Starts, above, describe, encode_tile, fit_groups
from skyrun.quant.encoders.affine_super import HALF_TINY, Steps, level_two, mirror, neighbours, refit, to_half
from skyrun.quant.encoders.tiles import EncodeBatch, Workspace, in_batches


class _KType(NamedTuple):
    """A type with two levels of scales: its constants, the bytes of its fields, and where its search starts."""

    groups: int
    max_code: int
    max_scale: int
    halves: slice
    scales: slice
    codes: slice
    put_scales: Callable[[Tensor, Tensor, Tensor], None]
    put_codes: Callable[[Tensor, Tensor], None]
    steps: Steps
    starts: Starts
    weighted_starts: Starts  # with importance, outliers may cost little, so that the best range is smaller


class _LegacyType(NamedTuple):
    """A type whose blocks of 32 begin with a float16 scale and a float16 minimum, which is added and has any sign."""

    max_code: int
    codes: slice
    put_codes: Callable[[Tensor, Tensor], None]
    clips: tuple[tuple[float, float], ...]


# Clips and steps were chosen by exchanging them one at a time, together where a type has both, for the least error on
# many draws of Gaussian, Student-t, Laplace and matrix-like weights. Those of one code step more than the range are
# coarser by a few percent: they find good fits far from where the others search.
_Q2_K = _KType(
    groups=16,
    max_code=3,
    max_scale=15,
    halves=slice(80, 84),
    scales=slice(0, 16),
    codes=slice(16, 80),
    put_scales=pack.put_scales_4,
    put_codes=pack.put_codes_2,
    steps=((1, 1), (-1, -1), (1, 0), (-1, 0), (1, 2), (-1, -2)),
    starts=Starts(((0.3, 0.2), (-0.1, 0.5), (0.4, 0.0), (0.1, 0.3), (0.6, -0.1))),
    weighted_starts=Starts(
        ((0.1, 0.1), (0.1, 0.9), (0.7, 0.1), (-0.1, 1.3), (0.3, -0.1), (1.1, 0.1), (0.3, 0.7), (-0.3, 0.3), (0.7, 0.5))
    ),
)
_Q4_K = _KType(
    groups=8,
    max_code=15,
    max_scale=63,
    halves=slice(0, 4),
    scales=slice(4, 16),
    codes=slice(16, 144),
    put_scales=pack.put_scales_6,
    put_codes=pack.put_codes_4,
    steps=((1, 1), (-1, -1), (-1, -2), (-1, 0), (2, 1)),
    starts=Starts(((0.1, 0.1), (0.2, -0.1), (-0.2, 0.4), (0.5, -0.1), (-0.1, 0.2), (-0.9, 0.1))),
    weighted_starts=Starts(
        ((0.3, 0.1), (-0.1, 0.5), (0.7, -0.1), (0.1, 0.3), (0.1, 1.1), (1.7, 0.5), (0.1, 2.1), (0.3, -0.3), (2.1, 0.1))
    ),
)
_Q5_K = _KType(
    groups=8,
    max_code=31,
    max_scale=63,
    halves=slice(0, 4),
    scales=slice(4, 16),
    codes=slice(16, 176),
    put_scales=pack.put_scales_6,
    put_codes=pack.put_codes_5,
    steps=((1, 1), (-1, -1), (1, 0), (0, -3), (2, 1)),
    starts=Starts(((0.1, 0.0), (-0.3, 0.3), (0.3, -0.2), (0.0, 0.2), (-1.0, -0.1), (-1.0, -1.0))),
    weighted_starts=Starts(
        (
            *((0.1, 0.1), (0.5, -0.3), (-0.3, 0.3), (0.3, -0.1), (0.1, 0.9), (0.9, 0.7)),
            *((-0.3, -0.3), (1.5, 0.3), (0.3, 2.5)),
        )
    ),
)
_Q4_1 = _LegacyType(
    max_code=15,
    codes=slice(4, 20),
    put_codes=pack.put_legacy_codes_4,
    clips=(
        *((0.1, 0.0), (-0.1, 0.4), (0.2, -0.2), (0.1, -1.0), (0.0, 0.2), (0.4, 0.1)),
        *((-0.2, 0.5), (-1.2, 0.2), (0.3, -1.2), (0.3, 0.4), (-1.0, -1.0), (0.5, -0.2)),
    ),
)
_Q5_1 = _LegacyType(
    max_code=31,
    codes=slice(4, 24),
    put_codes=pack.put_legacy_codes_5,
    clips=(
        *((0.1, 0.1), (-1.0, 0.0), (0.4, -0.2), (-0.2, 0.3), (-1.0, -1.0), (-1.2, 0.2)),
        *((0.2, -1.2), (0.2, -0.1), (0.0, 0.2), (-1.2, -0.8), (-0.8, -1.2), (-0.3, 0.5)),
    ),
)
# Sparse weights need a code at exactly zero; with importance, outliers may cost little.
_LEGACY_ALIGNED = (0.0, 1.0, 0.5, -0.5)
_LEGACY_WEIGHTED = ((0.1, 0.9), (0.7, 0.7), (0.3, 1.5), (1.5, 0.1), (1.1, 0.3), (0.5, 2.5))


def _k_batch(kind: _KType) -> EncodeBatch:
    def encode(lanes: Tensor, weight: Tensor | None, space: Workspace) -> Tensor:
        tiles, block_size, n = lanes.shape
        shape = (tiles, kind.groups, block_size // kind.groups, n)
        x, weight = lanes.view(shape), None if weight is None else weight.view(shape)
        sign, low, high = mirror(x, x.amin(2), x.amax(2), kind.max_code, kind.max_scale)
        g = describe(x, weight, low.clamp_max_(0), high, kind.max_code, space)
        fit = fit_groups(g, kind.starts if weight is None else kind.weighted_starts, False, space)
        found = level_two(g, fit, kind.max_scale, space)
        found = refit(g, neighbours(g, found, kind.steps, kind.max_scale, space), space)
        inverse, bias = (part.unsqueeze(2) for part in found.rounding(0))
        block_bytes = max(field.stop for field in (kind.halves, kind.codes))
        out = space("bytes", tiles, block_bytes, n, dtype=torch.uint8)
        pack.put_halves(out[:, kind.halves], (found.d * sign)[:, 0], (found.dmin * sign)[:, 0])
        kind.put_scales(out[:, kind.scales], found.scale, found.minimum)
        code = space("code", *shape[1:])
        for t in range(tiles):
            encode_tile(x[t], inverse[t], bias[t], 0, kind.max_code, code)
            kind.put_codes(out[t, kind.codes], code)
        return _block_by_block(out, space)

    return encode


def _legacy_batch(kind: _LegacyType) -> EncodeBatch:
    def encode(lanes: Tensor, weight: Tensor | None, space: Workspace) -> Tensor:
        tiles, width, n = lanes.shape
        x, weight = lanes.unsqueeze(1), None if weight is None else weight.unsqueeze(1)
        g = describe(x, weight, x.amin(2), x.amax(2), kind.max_code, space)
        clips = kind.clips if weight is None else (*kind.clips, *_LEGACY_WEIGHTED)
        fit = fit_groups(g, Starts(clips, _LEGACY_ALIGNED), True, space, rounds=1)
        d = torch.maximum(to_half(fit.scale), above(fit.scale, torch.zeros_like(fit.scale)).mul_(HALF_TINY))
        minimum = to_half(torch.addcmul(g.mean, fit.mean_code, d, value=-1))
        zero = torch.eq(d, 0, out=torch.empty_like(d))
        inverse = torch.add(d, zero, alpha=ENDLESS).reciprocal_()
        bias = torch.mul(minimum, inverse).neg_()
        out = space("bytes", tiles, kind.codes.stop, n, dtype=torch.uint8)
        pack.put_halves(out[:, :4], d[:, 0], minimum[:, 0])
        code = space("code", width, n)
        for t in range(tiles):
            kind.put_codes(out[t, kind.codes], encode_tile(lanes[t], inverse[t], bias[t], 0, kind.max_code, code))
        return _block_by_block(out, space)

    return encode


def _plain_batch(kind: _LegacyType) -> EncodeBatch:
    """ggml's quantize_row_q4_1_ref and quantize_row_q5_1_ref: equal steps over the range, halves rounded up."""

    def encode(lanes: Tensor, _: Tensor | None, space: Workspace) -> Tensor:
        tiles, width, n = lanes.shape
        low = lanes.amin(1, keepdim=True)
        d = (lanes.amax(1, keepdim=True) - low).div_(kind.max_code)
        inverse = d.reciprocal().nan_to_num_(posinf=0.0)
        out = space("bytes", tiles, kind.codes.stop, n, dtype=torch.uint8)
        pack.put_halves(out[:, :4], d[:, 0], low[:, 0])
        code = space("code", width, n)
        for t in range(tiles):
            torch.sub(lanes[t], low[t], out=code).mul_(inverse[t]).add_(0.5).floor_()
            kind.put_codes(out[t, kind.codes], code)
        return _block_by_block(out, space)

    return encode


def _block_by_block(lanes: Tensor, space: Workspace) -> Tensor:
    """uint8 [tiles, block_bytes, n] -> [tiles * n, block_bytes]."""
    tiles, block_bytes, n = lanes.shape
    blocks = space("blocks", tiles, n, block_bytes, dtype=torch.uint8)
    for tile, out in zip(lanes, blocks, strict=True):
        out.copy_(tile.T)
    return blocks.view(-1, block_bytes)


def _over(encode: EncodeBatch) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda x, importance: in_batches(x, importance, encode)


encode_q2_k, encode_q4_k, encode_q5_k = (_over(_k_batch(kind)) for kind in (_Q2_K, _Q4_K, _Q5_K))
encode_q4_1, encode_q5_1 = (_over(_legacy_batch(kind)) for kind in (_Q4_1, _Q5_1))
encode_q4_1_plain, encode_q5_1_plain = (_over(_plain_batch(kind)) for kind in (_Q4_1, _Q5_1))
