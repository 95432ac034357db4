"""Multiply a few rows with a quantized weight in Triton: blocks are decoded in registers and multiplied there.

With few rows, time goes into reading the weight; here it is read once and in its quantized form. Tensor cores take at
least 16 rows: fewer rows cost as much as 16, but still less than reading the weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skyrun.kernels.formats import block_format
from skyrun.kernels.triton.blocks import PIECES, decode
from skyrun.kernels.triton.decode import aligned
from skyrun.kernels.weight import QuantizedWeight

COLS, WARPS = 16, 4  # rows of the weight that a program multiplies, and its warps
_LEAST = 16  # rows that tensor cores take


@triton.jit(do_not_specialize=["M", "n"])  # so that no number of them compiles a kernel of its own
def few_rows_kernel(
    x,
    data,
    bias,
    out,
    M,
    N,
    n,
    stride,
    K: tl.constexpr,
    MROWS: tl.constexpr,
    NROWS: tl.constexpr,
    TYPE: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    SIZE: tl.constexpr,
    DOT: tl.constexpr,
):
    """out [M, N] = x [M, K] @ w^T + bias, with w [N, K] in n blocks of SIZE values. DOT: dtype of the operands."""
    m = tl.program_id(1) * MROWS + tl.arange(0, MROWS)
    w = tl.program_id(0) * NROWS + tl.arange(0, NROWS)
    per_step: tl.constexpr = 256 // SIZE
    width: tl.constexpr = per_step * ROWS * 16  # values of a step in one piece
    column = tl.arange(0, width)
    row = column // 16 % ROWS
    at = column // (ROWS * 16) * SIZE + row // RUN * (COUNT * RUN * 16) + row % RUN * 16 + column % 16
    in_step = tl.arange(0, NROWS * per_step)
    w_block = (tl.program_id(0) * NROWS + in_step // per_step).to(tl.int64) * (K // SIZE) + in_step % per_step
    there = tl.program_id(0) * NROWS + in_step // per_step < N
    total = tl.zeros((MROWS, NROWS), tl.float32)
    for start in range(0, K, 256):
        keep = there & (start // SIZE + in_step % per_step < K // SIZE)
        pieces = decode(data, n.to(tl.int64), w_block + start // SIZE, keep, TYPE)
        for piece in tl.static_range(COUNT):
            k = start + at + piece * (RUN * 16)
            inside = (m < M)[:, None] & (k < K)[None, :]
            rows = tl.load(x + m[:, None].to(tl.int64) * stride + k[None, :], mask=inside, other=0.0).to(DOT)
            weights = tl.reshape(pieces[piece], (NROWS, width)).to(DOT)
            total = tl.dot(rows, tl.trans(weights), total)
    if bias is not None:
        total += tl.load(bias + w, mask=w < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (w < N)[None, :]
    tl.store(out + m[:, None].to(tl.int64) * N + w[None, :], total.to(out.dtype.element_ty), mask=inside)


def constants(type: str, cols: int, rows: int) -> dict[str, int | str]:
    """The kernel's constexpr arguments, except DOT."""
    pieces = PIECES[type]
    tile = {"K": cols, "MROWS": max(_LEAST, triton.next_power_of_2(rows)), "NROWS": COLS, "TYPE": type}
    block = {"COUNT": pieces.count, "ROWS": pieces.rows, "RUN": pieces.run, "SIZE": block_format(type).block_size}
    return tile | block


def multiply(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, cols] @ weight [rows, cols]^T + bias [rows] -> [M, rows] in x's dtype.

    M is at most 64. x is float16 or bfloat16: float32 on tensor cores would need more registers than there are.
    """
    return _multiply(x, weight, bias, tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16)


def _multiply(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, dot: tl.dtype) -> Tensor:
    (m, cols), (rows, _) = x.shape, weight.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty((m, rows), dtype=x.dtype, device=x.device)
    fixed = constants(weight.type, cols, m)
    n = rows * cols // block_format(weight.type).block_size
    if m and rows:
        data = aligned(weight.data, weight.type, weight.planar)
        grid = (triton.cdiv(rows, COLS), triton.cdiv(m, fixed["MROWS"]))
        few_rows_kernel[grid](x, data, bias, out, m, rows, n, x.stride(0), **fixed, DOT=dot, num_warps=WARPS)
    return out
