"""Encode quantized weights as rotated int8 in Triton, for the fast path.

A program decodes a whole row into registers, rotates and rounds it there, and writes one byte per weight.
"""

import torch
import triton
import triton.language as tl

from skyrun.kernels.formats import block_format
from skyrun.kernels.rotated import RotatedInt8, check_width
from skyrun.kernels.triton.blocks import PIECES, decode
from skyrun.kernels.triton.decode import aligned
from skyrun.kernels.triton.elementwise import row_tile, row_warps
from skyrun.kernels.triton.rotation import store_row
from skyrun.kernels.weight import QuantizedWeight


@triton.jit
def _in_order(pieces, COUNT: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr, NB: tl.constexpr, TILE: tl.constexpr):
    """Pieces of NB blocks -> their values in order, [TILE, 256]."""
    if COUNT == 1:
        last = pieces[0]
    elif COUNT == 2:
        last = tl.join(pieces[0], pieces[1])
    else:
        last = tl.join(tl.join(pieces[0], pieces[2]), tl.join(pieces[1], pieces[3]))
    apart = tl.reshape(last, (NB, ROWS // RUN, RUN * 16, COUNT))
    return tl.reshape(tl.permute(apart, (0, 1, 3, 2)), (TILE, 256))


@triton.jit(do_not_specialize=["n"])  # n = 1 must not compile a kernel of its own
def encode_kernel(
    data,
    codes,
    scales,
    n,
    D: tl.constexpr,
    TILE: tl.constexpr,
    TYPE: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Encode one row of D values as rotated int8. data: the weight's n blocks of SIZE values each."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, TILE * (256 // SIZE))
    pieces = decode(data, n.to(tl.int64), row * (D // SIZE) + block, block < D // SIZE, TYPE)
    y = _in_order(pieces, COUNT, ROWS, RUN, TILE * (256 // SIZE), TILE)
    at = tl.arange(0, TILE)[:, None] * 256 + tl.arange(0, 256)[None, :]
    store_row(tl.where(at < D, y, 0.0), codes + row * D, scales, row, at, at < D, TILE)


def constants(type: str, cols: int) -> dict[str, int | str]:
    """The kernel's constexpr arguments."""
    pieces = PIECES[type]
    tile: dict[str, int | str] = {
        "D": cols,
        "TILE": row_tile(cols),
        "TYPE": type,
        "SIZE": block_format(type).block_size,
    }
    return tile | {"COUNT": pieces.count, "ROWS": pieces.rows, "RUN": pieces.run}


def encode_weight(weight: QuantizedWeight) -> RotatedInt8:
    """As `torch.int8.encode_weight`, for block types."""
    rows, cols = weight.shape
    check_width(cols)
    codes = torch.empty((rows, cols), dtype=torch.int8, device=weight.data.device)
    scales = torch.empty(rows, dtype=torch.float32, device=weight.data.device)
    n = rows * cols // block_format(weight.type).block_size
    if rows:
        data = aligned(weight.data, weight.type, weight.planar)
        encode_kernel[(rows,)](data, codes, scales, n, **constants(weight.type, cols), num_warps=row_warps(cols))
    return RotatedInt8(codes, scales, torch.float32)
