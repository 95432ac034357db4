"""Attention with int8 scores in Triton: the twin of `torch.attention`.

A program takes 128 queries of a head and passes over all keys once with an online softmax (FlashAttention,
arXiv:2205.14135). Scores are computed by int8 tensor cores, values are multiplied in float16, int8 or float8 (as
SageAttention2, arXiv:2411.10958).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from skyrun.kernels.machine.device import float16_sums_are_quick
from skyrun.kernels.quantized_keys import BLOCK, HEAD_DIM, LARGEST, QuantizedKeys, empty_values, largest_values
from skyrun.kernels.tiles import Selection
from skyrun.kernels.triton.rotation import to_codes

QUERIES, KEYS, WARPS, STAGES = 128, BLOCK, 8, 3
ROWS, ROW_WARPS = 64, 4  # of the kernels that quantize queries, keys and values
FACTOR = math.log2(math.e) / math.sqrt(HEAD_DIM)  # of scores, so that exp2 makes probabilities of them
LARGEST_WEIGHT = {name: math.log2(probability) for name, (probability, _) in LARGEST.items()}
# A float32 at 1.5 * 2^23 has an integer in its low bits: adding it rounds, half to even, and its low byte is a code;
# an integer matmul that starts from its bits ends as a float.
_AT_INTEGERS: tl.constexpr = tl.constexpr(12582912.0)
_BITS: tl.constexpr = tl.constexpr(0x4B400000)
_FAR: tl.constexpr = tl.constexpr(32.0)  # a block whose probabilities are below 2^-32 of the largest adds nothing


@triton.jit(do_not_specialize=["count"])  # clips of all sizes share a kernel
def quantize_kernel(x, mean, codes, scales, count, factor, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Quantize rows of one head, minus the mean if there is one, to int8. `factor` is multiplied into the scales."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    lane = head * 128 + tl.arange(0, 128)
    at = row[:, None] * (HEADS * 128) + lane[None, :]
    inside = row < count
    values = tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)
    if mean is not None:
        values -= tl.load(mean + lane)[None, :]
    peak = tl.max(tl.abs(values), 1)
    inverse = 127 / tl.where(peak > 0, peak, 1.0)
    tl.store(codes + at, to_codes(values, inverse[:, None]), mask=inside[:, None])
    # An infinite or NaN value makes the scale NaN: the maximum may miss NaN, this sum does not.
    tl.store(scales + head * count + row, peak * (factor / 127) + tl.sum(values * 0.0, 1), mask=inside)


@triton.jit(do_not_specialize=["count"])
def values_kernel(v, scales, out, count, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Values of one head in float16, divided by its scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    at = row[:, None] * (HEADS * 128) + head * 128 + tl.arange(0, 128)[None, :]
    inside = (row < count)[:, None]
    values = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (values * (1 / tl.load(scales + head))).to(tl.float16), mask=inside)


@triton.jit(do_not_specialize=["count"])
def channels_kernel(v, inverse, out, sums, count, stride, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Values of one head times the inverse of their channels' scales, in 8 bits, a row of `out` for each channel.

    A row of `out` has `stride` values, zeros beyond `count`. sums: if there are any, those of a block of ROWS values.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = row[:, None] * (HEADS * 128) + lane[None, :]
    values = tl.load(v + at, mask=(row < count)[:, None], other=0.0).to(tl.float32) * tl.load(inverse + lane)[None, :]
    if sums is not None:
        codes = (values + _AT_INTEGERS).to(tl.int32, bitcast=True).to(tl.int8)
        total = tl.sum(codes.to(tl.int32), 0)
        tl.store(sums + tl.program_id(0).to(tl.int64) * (HEADS * 128) + lane, 128 * total)
    else:
        codes = values.to(out.dtype.element_ty)
    tl.store(out + lane.to(tl.int64)[:, None] * stride + row[None, :], tl.trans(codes))


@triton.jit
def _scores(q, k, k_scales, start, M, HEADS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """Scores of queries and KEYS keys, but for the scales of the queries, and the largest ones of keys that are there.

    Query scales are not negative, so the maximum may be taken before scaling; one multiply-add per score remains.
    Keys without scales are in 16 bits.
    """
    key = start + tl.arange(0, KEYS)
    k += start.to(tl.int64) * (HEADS * 128)
    at = tl.arange(0, KEYS)[:, None] * (HEADS * 128) + tl.arange(0, 128)[None, :]
    codes = tl.load(k + at, mask=(key < M)[:, None], other=0) if MASKED else tl.load(k + at)
    if k_scales is not None:
        scale = tl.load(k_scales + key, mask=key < M, other=0.0) if MASKED else tl.load(k_scales + key)
        scores = tl.dot(q, tl.trans(codes), out_dtype=tl.int32).to(tl.float32) * scale[None, :]
    else:
        scores = tl.dot(q, tl.trans(codes))
    seen = tl.where((key < M)[None, :], scores, float("-inf")) if MASKED else scores
    return scores, tl.max(seen, 1)


@triton.jit
def _add_keys(
    q, q_scale, k, k_scales, v, start, M, peak, total, mixed, HEADS: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, FLOAT16_SUMS: tl.constexpr
):  # fmt: skip
    """Add KEYS more keys: their weights to `total`, their weighted values to `mixed`, both relative to the peak."""
    key = start + tl.arange(0, KEYS)
    scores, largest = _scores(q, k, k_scales, start, M, HEADS, KEYS, MASKED)
    v += start.to(tl.int64) * (HEADS * 128)
    at = tl.arange(0, KEYS)[:, None] * (HEADS * 128) + tl.arange(0, 128)[None, :]
    values = tl.load(v + at, mask=(key < M)[:, None], other=0.0) if MASKED else tl.load(v + at)
    higher = tl.maximum(peak, largest * q_scale)
    shrink = tl.exp2(peak - higher)
    weights = tl.exp2(scores * q_scale[:, None] - higher[:, None])
    if MASKED:
        weights = tl.where((key < M)[None, :], weights, 0.0)
    total = total * shrink + tl.sum(weights, 1)
    if FLOAT16_SUMS:
        added = tl.dot(weights.to(tl.float16), values, out_dtype=tl.float16).to(tl.float32)
        mixed = mixed * shrink[:, None] + added
    else:
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None])
    return higher, total, mixed


@triton.jit
def _add_block(
    q, q_scale, k, k_scales, v, sums, start, M, stride, peak, unit, total, mixed, HEADS: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, FLOAT16_SUMS: tl.constexpr, LARGEST: tl.constexpr
):  # fmt: skip
    """Add a block of keys with 8-bit values. `total` and `mixed` are relative to `unit`, which is the block's own peak,
    so that its largest weight gets the largest code, exp2(LARGEST); but not further below the peak of all than _FAR.
    """
    key = start + tl.arange(0, KEYS)
    lane = tl.arange(0, 128)
    scores, largest = _scores(q, k, k_scales, start, M, HEADS, KEYS, MASKED)
    values = tl.load(v + lane.to(tl.int64)[:, None] * stride + key[None, :])
    here = largest * q_scale
    higher = tl.maximum(peak, here)
    near = tl.maximum(here, higher - _FAR)
    shift = tl.exp2(unit - near)
    weights = tl.exp2(scores * q_scale[:, None] - (near - LARGEST)[:, None])
    if MASKED:
        weights = tl.where((key < M)[None, :], weights, 0.0)
    total = total * shift + tl.sum(weights, 1)
    if sums is not None:
        codes = (weights + (_AT_INTEGERS - 128)).to(tl.int32, bitcast=True).to(tl.int8)
        first = tl.load(sums + start // KEYS * (HEADS * 128) + lane) + _BITS
        first = tl.broadcast_to(first[None, :], (q.shape[0], 128))
        added = tl.dot(codes, tl.trans(values), first, out_dtype=tl.int32).to(tl.float32, bitcast=True) - _AT_INTEGERS
    elif FLOAT16_SUMS:
        added = tl.dot(weights.to(v.dtype.element_ty), tl.trans(values), out_dtype=tl.float16).to(tl.float32)
    else:
        added = tl.dot(weights.to(v.dtype.element_ty), tl.trans(values))
    return higher, near, total, mixed * shift[:, None] + added


@triton.jit
def _add(
    q, q_scale, k, k_scales, v, sums, start, M, stride, peak, unit, total, mixed, HEADS: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, FLOAT16_SUMS: tl.constexpr, LARGEST: tl.constexpr
):  # fmt: skip
    """Add KEYS more keys, whose values are in 8 bits if there is a LARGEST."""
    if LARGEST is None:
        peak, total, mixed = _add_keys(
            q, q_scale, k, k_scales, v, start, M, peak, total, mixed, HEADS, KEYS, MASKED, FLOAT16_SUMS
        )
    else:
        peak, unit, total, mixed = _add_block(
            q, q_scale, k, k_scales, v, sums, start, M, stride, peak, unit, total, mixed, HEADS, KEYS, MASKED,
            FLOAT16_SUMS, LARGEST
        )  # fmt: skip
    return peak, unit, total, mixed


@triton.jit(do_not_specialize=["L", "M", "width"])
def attend_kernel(
    q, q_scales, k, k_scales, v, v_scales, sums, out, lists, counts, heads, L, M, stride, width, factor,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FLOAT16_SUMS: tl.constexpr, LARGEST: tl.constexpr
):  # fmt: skip
    """Attend from QUERIES queries of one head to all M keys, or to the tiles in its list. exp2 is used.

    q_scales: with log2(e) / sqrt(128) in them; where there are none, `factor` is that, and all is in 16 bits.
    stride: of a channel's values in 8 bits. LARGEST: the logarithm of their largest weight, None in 16 bits.
    lists, counts: numbers of whole tiles of KEYS keys, `width` for each program, and how many of them count. heads:
    which head is whose turn, so that those with much to do come first.
    """
    row = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    head = tl.program_id(1)
    whole = M // KEYS * KEYS
    steps = M // KEYS
    listed = 0
    if lists is not None:
        head = tl.load(heads + head)
        at_list = head * tl.num_programs(0) + tl.program_id(0)
        lists += at_list.to(tl.int64) * width
        steps = tl.load(counts + at_list)
        listed = tl.load(lists).to(tl.int32)
    lane = head * 128 + tl.arange(0, 128)
    at = row[:, None] * (HEADS * 128) + lane[None, :]
    inside = row < L
    codes = tl.load(q + at, mask=inside[:, None], other=0)
    scale = tl.full((QUERIES,), factor, tl.float32)
    k += head * 128
    if k_scales is not None:
        scale = tl.load(q_scales + head * L + row, mask=inside, other=0.0)
        k_scales += head * M
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    unit = peak
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, 128), tl.float32)
    v += head * 128 if LARGEST is None else head.to(tl.int64) * 128 * stride
    if sums is not None:
        sums += head * 128
    for step in tl.range(0, steps):
        start = step * KEYS
        if lists is not None:  # the next one is on its way while this one is worked on
            start = listed * KEYS
            listed = tl.load(lists + step + 1).to(tl.int32)
        peak, unit, total, mixed = _add(
            codes, scale, k, k_scales, v, sums, start, M, stride, peak, unit, total, mixed, HEADS, KEYS, False,
            FLOAT16_SUMS, LARGEST
        )  # fmt: skip
    if whole < M:
        peak, unit, total, mixed = _add(
            codes, scale, k, k_scales, v, sums, whole, M, stride, peak, unit, total, mixed, HEADS, KEYS, True,
            FLOAT16_SUMS, LARGEST
        )  # fmt: skip
    if LARGEST is not None:
        result = mixed * (1 / total)[:, None] * tl.load(v_scales + lane)[None, :]
    elif v_scales is not None:
        result = mixed * (tl.load(v_scales + head) / total)[:, None]
    else:
        result = mixed * (1 / total)[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside[:, None])


def quantize_keys(k: Tensor, mean: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `torch.attention.quantize_keys`."""
    return _quantize(k, k.mean(0, dtype=torch.float32) if mean is None else mean, 1.0, out)


def quantize_values(v: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `torch.attention.quantize_values`."""
    values, scales, sums = empty_values(largest_values(v), len(v), precision)
    write_values(v, 0, values, scales, sums)
    return values, scales, sums


def write_values(v: Tensor, first: int, values: Tensor, scales: Tensor, sums: Tensor | None) -> None:
    """As `torch.attention.write_values`."""
    v, heads = v.contiguous(), v.shape[1] // HEAD_DIM
    if values.dtype == torch.float16:
        grid, part = (triton.cdiv(len(v), ROWS), heads), values[first:]
        values_kernel[grid](v, scales, part, len(v), heads, ROWS, num_warps=ROW_WARPS)
        return
    part, stride = values.flatten()[first:], values.shape[1]
    part_sums = None if sums is None else sums[first // BLOCK :]
    channels_kernel[(triton.cdiv(len(v), BLOCK), heads)](
        *(v, 1 / scales, part, part_sums, len(v), stride, heads, BLOCK), num_warps=ROW_WARPS
    )


def attend(q: Tensor, keys: QuantizedKeys, chosen: Selection | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """As `torch.attention.attend`. Tiles are those of the kernel."""
    if not len(q):
        return torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    return attend_codes(*_quantize(q, None, FACTOR), keys, chosen, dtype or q.dtype)


def attend_codes(
    codes: Tensor, scales: Tensor, keys: QuantizedKeys, chosen: Selection | None, dtype: torch.dtype
) -> Tensor:
    """Attend from queries that are quantized: int8 [L, H * 128] and float32 [H, L]."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    heads, rows = scales.shape
    lists, counts, turns, width = _listed(chosen)
    attend_kernel[(triton.cdiv(rows, QUERIES), heads)](
        *(codes, scales, keys.codes, keys.scales, keys.values, keys.value_scales, keys.block_sums, out, lists, counts),
        *(turns, rows, len(keys.codes), keys.values.shape[1], width, 0.0, heads, QUERIES, KEYS),
        *(float16_sums_are_quick(codes.device), LARGEST_WEIGHT.get(keys.precision)),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def attend_plain(q: Tensor, k: Tensor, v: Tensor, chosen: Selection, dtype: torch.dtype | None = None) -> Tensor:
    """As `torch.attention.attend_plain`, for values in 16 bits."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    heads, rows = q.shape[1] // HEAD_DIM, len(q)
    lists, counts, turns, width = _listed(chosen)
    attend_kernel[(triton.cdiv(rows, QUERIES), heads)](
        *(q, None, k, None, v, None, None, out, lists, counts, turns, rows, len(k), 0, width, FACTOR),
        *(heads, QUERIES, KEYS, False, None),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def _listed(chosen: Selection | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """Lists, their lengths, the heads in the order of their work, and the width of a row of the lists."""
    if chosen is None:
        return None, None, None, 0
    turns = chosen.counts.sum(1).argsort(descending=True).int()
    return chosen.lists, chosen.counts, turns, chosen.lists.shape[2]


def _quantize(x: Tensor, mean: Tensor | None, factor: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x, heads, rows = x.contiguous(), x.shape[1] // HEAD_DIM, len(x)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device) if out is None else out
    scales = torch.empty((heads, rows), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, ROWS), heads)
    quantize_kernel[grid](x, mean, codes, scales, rows, factor, heads, ROWS, num_warps=ROW_WARPS)
    return codes, scales
