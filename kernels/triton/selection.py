"""The choice of key tiles in Triton: the twin of `torch.selection`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skyrun.kernels.quantized_keys import HEAD_DIM
from skyrun.kernels.tiles import ALIKE, HALVINGS, Pools, Selection, Tiles
from skyrun.kernels.torch.selection import FACTOR, LARGEST
from skyrun.kernels.triton.rotation import to_codes

POOL_WARPS = LIST_WARPS = SCORE_WARPS = 4
SIDE = 64  # tiles of queries and of keys that a program scores
_BLOCK_OF_LISTS = 16  # a row of a list is a multiple of so many, so that it is read and written in wide words


@triton.jit(do_not_specialize=["count"])
def pool_kernel(x, mean, codes, scales, alike, count, least, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """The mean of a tile of ROWS rows of one head as int8, and whether its members have a mean cosine of `least`."""
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    lane = head * 128 + tl.arange(0, 128)
    inside = (row < count)[:, None]
    values = tl.load(x + row[:, None] * (HEADS * 128) + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    if mean is not None:
        values = tl.where(inside, values - tl.load(mean + lane)[None, :], 0.0)
    share = 1.0 / tl.minimum(count - tile * ROWS, ROWS).to(tl.float32)
    squares = tl.sum(values * values, 1)
    lengths = tl.rsqrt(tl.maximum(squares, 1.1754943508222875e-38))
    unit = tl.sum(values * lengths[:, None], 0) * share
    centre = tl.sum(values, 0) * share
    peak = tl.max(tl.abs(centre), 0)
    at = tl.num_programs(0) * head + tile
    tl.store(codes + tile * (HEADS * 128) + lane, to_codes(centre, 127 / tl.where(peak > 0, peak, 1.0)))
    tl.store(scales + at, peak / 127)
    tl.store(alike + at, (tl.sum(unit * unit, 0) >= least).to(tl.int8))


@triton.jit(do_not_specialize=["T", "K", "stride"])
def score_kernel(
    q, q_scales, k, k_scales, scores, T, K, stride, factor, LARGEST: tl.constexpr, HEADS: tl.constexpr,
    SIDE: tl.constexpr
):  # fmt: skip
    """Scores of SIDE tiles of queries and SIDE tiles of keys of one head, in float16; times `factor`."""
    ours = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    theirs = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    head = tl.program_id(2)
    lane = head * 128 + tl.arange(0, 128)
    a = tl.load(q + ours.to(tl.int64)[:, None] * (HEADS * 128) + lane[None, :], mask=(ours < T)[:, None], other=0)
    b = tl.load(k + theirs.to(tl.int64)[:, None] * (HEADS * 128) + lane[None, :], mask=(theirs < K)[:, None], other=0)
    q_scale = tl.load(q_scales + head * T + ours, mask=ours < T, other=0.0) * factor
    k_scale = tl.load(k_scales + head * K + theirs, mask=theirs < K, other=0.0)
    scored = tl.dot(a, tl.trans(b), out_dtype=tl.int32).to(tl.float32) * q_scale[:, None] * k_scale[None, :]
    scored = tl.minimum(tl.maximum(scored, -LARGEST), LARGEST)
    at = (head.to(tl.int64) * T + ours)[:, None] * stride + theirs[None, :]
    tl.store(scores + at, scored.to(tl.float16), mask=(ours < T)[:, None] & (theirs < K)[None, :])


@triton.jit(do_not_specialize=["T", "K", "stride", "whole", "queries", "keys"])
def list_kernel(
    scores, lists, counts, q_alike, k_alike, always, starts, shares, T, K, stride, whole, queries, keys,
    HALVINGS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The list of one query tile and head. `lists` is the memory that the scores are in: a row is read, then replaced.

    WIDTH: a power of two, at least K. whole: how many tiles of keys are whole.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    number = tl.arange(0, WIDTH)
    there = number < K
    row = (head.to(tl.int64) * T + tile) * stride
    scored = tl.load(scores + row + number, mask=there, other=float("-inf")).to(tl.float32)
    shared = tl.exp2(scored - tl.max(scored, 0))
    start = tl.load(starts + tile)
    kept = (number >= start // keys) & (number <= (start + queries - 1) // keys)
    kept = kept | (number >= whole) | (tl.load(always + number, mask=there, other=0) != 0)
    kept = kept | (tl.load(k_alike + head * K + number, mask=there, other=1) == 0)
    share = tl.load(shares + head)
    need = share * tl.sum(shared, 0) - tl.sum(tl.where(kept, shared, 0.0), 0)
    others = tl.where(kept, -1.0, shared)
    low = 0.0
    high = 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = tl.sum(tl.where(others >= middle, others, 0.0), 0) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    low = tl.where(need <= 0, 2.0, low)
    low = tl.where(tl.load(q_alike + head * T + tile) == 0, -1.0, tl.where(share >= 1, -1.0, low))  # all
    chosen = (kept | (others >= low) | (others != others)) & (number < whole)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(lists + row + place, number.to(tl.int16), mask=chosen)
    tl.store(counts + head * T + tile, tl.sum(chosen.to(tl.int32), 0))


def pool(x: Tensor, tile: int, mean: Tensor | None) -> Pools:
    """As `torch.selection.pool`. tile: a power of two."""
    x, heads, count = x.contiguous(), x.shape[1] // HEAD_DIM, triton.cdiv(len(x), tile)
    codes = torch.empty((count, x.shape[1]), dtype=torch.int8, device=x.device)
    scales = torch.empty((heads, count), dtype=torch.float32, device=x.device)
    alike = torch.empty((heads, count), dtype=torch.int8, device=x.device)
    pool_kernel[(count, heads)](x, mean, codes, scales, alike, len(x), ALIKE, heads, tile, num_warps=POOL_WARPS)
    return Pools(codes, scales, alike.view(torch.bool))


def choose(q: Pools, k: Pools, shares: Tensor, starts: Tensor, always: Tensor, keys: int, tiles: Tiles) -> Selection:
    """As `torch.selection.choose`."""
    (heads, queries), count = q.scales.shape, k.scales.shape[1]
    stride = triton.cdiv(count + 1, _BLOCK_OF_LISTS) * _BLOCK_OF_LISTS
    lists = torch.empty((heads, queries, stride), dtype=torch.int16, device=starts.device)
    counts = torch.empty((heads, queries), dtype=torch.int32, device=starts.device)
    scores = lists.view(torch.float16)
    score_kernel[(triton.cdiv(queries, SIDE), triton.cdiv(count, SIDE), heads)](
        *(q.codes, q.scales, k.codes, k.scales, scores, queries, count, stride, FACTOR, LARGEST, heads, SIDE),
        num_warps=SCORE_WARPS,
    )
    list_kernel[(queries, heads)](
        *(scores, lists, counts, q.alike.view(torch.int8), k.alike.view(torch.int8), always.view(torch.int8)),
        *(starts, shares, queries, count, stride, keys // tiles.keys, tiles.queries, tiles.keys, HALVINGS),
        list_width(count),
        num_warps=LIST_WARPS,
    )
    return Selection(lists, counts, keys, tiles)


def list_width(count: int) -> int:
    """How many values a program holds that makes a list of `count` tiles: a power of two, of which there are few."""
    return max(512, int(triton.next_power_of_2(count)))
