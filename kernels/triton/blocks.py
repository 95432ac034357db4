"""Decode a tile of blocks inside a kernel: shared by the kernels that decode, encode and multiply.

A block is a matrix of codes with rows of 16 bytes; each such row decodes to P rows of 16 values, one in each of P
pieces. A tile of `NB` blocks decodes to a tuple of P pieces, float32 [NB, R, 16], where row r of piece p starts at
value (r // S * P + p) * S * 16 + r % S * 16 of its block; `PIECES` lists P, R and S. The 16 bytes and their values lie
next to each other in memory and in the registers of a thread, so loads and stores have full width and threads exchange
nothing.

Formulas are those of `torch.decode`. Scale * sub-scale * code is exact in float32 and at most one addition follows, so
fused multiply-add gives the same values.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from skyrun.kernels.triton import blocks_k as k
from skyrun.kernels.triton.blocks_io import bytes_of, half, halves, plane, word


@dataclass(frozen=True)
class Pieces:
    """The pieces of a block. count: P, how many. rows: R, rows of each. run: S, consecutive rows of a piece."""

    count: int
    rows: int
    run: int


PIECES = {
    "Q8_0": Pieces(1, 2, 2),
    "Q6_K": Pieces(4, 4, 2),
    "Q5_K": Pieces(2, 8, 2),
    "Q4_K": Pieces(2, 8, 2),
    "Q3_K": Pieces(4, 4, 2),
    "Q2_K": Pieces(4, 4, 2),
    "Q5_1": Pieces(2, 1, 1),
    "Q5_0": Pieces(2, 1, 1),
    "Q4_1": Pieces(2, 1, 1),
    "Q4_0": Pieces(2, 1, 1),
    "IQ4_NL": Pieces(2, 1, 1),
    "IQ4_XS": Pieces(2, 8, 1),
}


@triton.jit
def _q8_0(data, n, block, keep):
    codes = bytes_of(plane(data, n, block, 0, 32), keep, 2).to(tl.int8, bitcast=True)
    return (codes.to(tl.float32) * half(plane(data, n, block, 32, 2), keep),)


@triton.jit
def _q4_0(data, n, block, keep):
    codes = bytes_of(plane(data, n, block, 0, 16), keep, 1)
    d = half(plane(data, n, block, 16, 2), keep)
    return ((codes & 15).to(tl.float32) - 8) * d, ((codes >> 4).to(tl.float32) - 8) * d


@triton.jit
def _q4_1(data, n, block, keep):
    codes = bytes_of(plane(data, n, block, 0, 16), keep, 1)
    d, m = halves(word(plane(data, n, block, 16, 4), keep))
    return (codes & 15).to(tl.float32) * d + m, (codes >> 4).to(tl.float32) * d + m


@triton.jit
def _q5(data, n, block, keep):
    """The codes of Q5_0 and Q5_1: four bits each, and the fifth bit of value i is bit i of a word."""
    codes = bytes_of(plane(data, n, block, 0, 16), keep, 1).to(tl.int32)
    fifth = word(plane(data, n, block, 16, 4), keep) >> tl.arange(0, 16)[None, None, :]
    return (codes & 15) | ((fifth & 1) << 4), (codes >> 4) | ((fifth >> 12) & 16)


@triton.jit
def _q5_0(data, n, block, keep):
    low, high = _q5(data, n, block, keep)
    d = half(plane(data, n, block, 20, 2), keep)
    return (low - 16).to(tl.float32) * d, (high - 16).to(tl.float32) * d


@triton.jit
def _q5_1(data, n, block, keep):
    low, high = _q5(data, n, block, keep)
    d, m = halves(word(plane(data, n, block, 20, 4), keep))
    return low.to(tl.float32) * d + m, high.to(tl.float32) * d + m


@triton.jit
def decode(data, n, block, keep, TYPE: tl.constexpr):
    """Decode blocks `block` (int64 [NB]) of the n blocks at `data` to pieces; zeros are loaded where not `keep`."""
    block = block[:, None, None]
    keep = keep[:, None, None]
    if TYPE == "Q8_0":
        return _q8_0(data, n, block, keep)
    elif TYPE == "Q6_K":
        return k.q6_k(data, n, block, keep)
    elif TYPE == "Q5_K":
        return k.q5_k(data, n, block, keep)
    elif TYPE == "Q4_K":
        return k.q4_k(data, n, block, keep)
    elif TYPE == "Q3_K":
        return k.q3_k(data, n, block, keep)
    elif TYPE == "Q2_K":
        return k.q2_k(data, n, block, keep)
    elif TYPE == "Q5_1":
        return _q5_1(data, n, block, keep)
    elif TYPE == "Q5_0":
        return _q5_0(data, n, block, keep)
    elif TYPE == "Q4_1":
        return _q4_1(data, n, block, keep)
    elif TYPE == "Q4_0":
        return _q4_0(data, n, block, keep)
    elif TYPE == "IQ4_NL":
        return k.iq4_nl(data, n, block, keep)
    else:
        tl.static_assert(TYPE == "IQ4_XS")
        return k.iq4_xs(data, n, block, keep)
