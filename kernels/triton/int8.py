"""The GEMM of rotated int8 rows in Triton: int32 sums on tensor cores; scales, bias, gate, residual in the epilogue."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from skyrun.kernels.machine.device import sums_in_tensor_memory
from skyrun.kernels.rotated import RotatedInt8


@dataclass(frozen=True)
class Tile:
    """How a GEMM is tiled: a program computes rows x cols values and sums over `depth` columns of x at a time."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


LARGE, SMALL = Tile(128, 256, 64, 8, 2), Tile(64, 128, 64, 4, 2)
SUMMING = Tile(128, 128, 128, 8, 2)  # with a residual, which needs registers
MIDDLE = Tile(
    128, 128, 64, 8, 2
)  # for B200: its tensor cores keep sums in a memory of their own, and larger tiles spill
_FEW = 256  # rows; up to here large tiles would leave most of a card idle
_ORDER = 8  # row tiles that are computed together, so that they share the weight's tiles in the cache


@triton.jit(do_not_specialize=["M"])  # clips of all sizes share a kernel
def multiply_kernel(
    x,
    w,
    x_scales,
    w_scales,
    bias,
    gate,
    residual,
    out,
    M,
    N,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    ORDER: tl.constexpr,
):
    """out [M, N] = residual + gate * (x_scales * w_scales * (x [M, K] @ w [N, K]^T) + bias); None is left out."""
    row, col = _tile_of(tl.program_id(0), M, N, ROWS, COLS, ORDER)
    rows = row * ROWS + tl.arange(0, ROWS)
    cols = col * COLS + tl.arange(0, COLS)
    depth = tl.arange(0, DEPTH)
    # Beyond the edge the last row is read again, so that the loop needs no mask; those results are not stored.
    x_at = x + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * K + depth[None, :]
    w_at = w + tl.minimum(cols, N - 1).to(tl.int64)[:, None] * K + depth[None, :]
    total = tl.zeros((ROWS, COLS), tl.int32)
    # Without this unrolling, Triton 3.8 and later spill the prefetched bytes on sm_86 and sm_89.
    for start in tl.range(0, K, DEPTH, loop_unroll_factor=2):
        total = tl.dot(tl.load(x_at + start), tl.trans(tl.load(w_at + start)), total, out_dtype=tl.int32)
    in_rows, in_cols = rows < M, cols < N
    scaled = total.to(tl.float32) * tl.load(x_scales + rows, mask=in_rows, other=0.0)[:, None]
    scaled *= tl.load(w_scales + cols, mask=in_cols, other=0.0)[None, :]
    if bias is not None:
        scaled += tl.load(bias + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        scaled *= tl.load(gate + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    inside = in_rows[:, None] & in_cols[None, :]
    if residual is not None:
        scaled += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile_of(program, M, N, ROWS: tl.constexpr, COLS: tl.constexpr, ORDER: tl.constexpr):
    """Row and column of a program's tile. Programs go through all columns of ORDER row tiles before the next ones."""
    row_tiles, col_tiles = tl.cdiv(M, ROWS), tl.cdiv(N, COLS)
    band = program // (ORDER * col_tiles)
    height = tl.minimum(row_tiles - band * ORDER, ORDER)
    within = program % (ORDER * col_tiles)
    return band * ORDER + within % height, within // height


def multiply(
    x: RotatedInt8,
    weight: RotatedInt8,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `torch.int8.multiply`."""
    large = MIDDLE if sums_in_tensor_memory(x.codes.device) else LARGE if residual is None else SUMMING
    return _multiply(x, weight, bias, gate, residual, SMALL if x.codes.shape[0] <= _FEW else large)


def _multiply(
    x: RotatedInt8, weight: RotatedInt8, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None, tile: Tile
) -> Tensor:
    (m, k), n = x.codes.shape, len(weight.codes)
    out = torch.empty((m, n), dtype=x.dtype, device=x.codes.device)
    if m:
        multiply_kernel[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.cols),)](
            *(x.codes.contiguous(), weight.codes.contiguous(), x.scales.contiguous(), weight.scales.contiguous()),
            *(t if t is None else t.contiguous() for t in (bias, gate, residual)),
            *(out, m, n, k, tile.rows, tile.cols, tile.depth, _ORDER),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
