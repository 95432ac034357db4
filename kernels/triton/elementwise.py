"""The operations that `elementwise` describes, in Triton: each reads its input once and writes its result once.

Where a sum runs over a token's row or the result is rotated int8, a program holds a whole row as a tile of groups of
256 and rotates and rounds it in registers. The other operations use tiles of _ROWS x _COLS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skyrun.kernels.rotated import GROUP, RotatedInt8, check_width
from skyrun.kernels.triton.rotation import store_row

_ROWS, _COLS = 4, 1024  # a program's tile if no sum runs over the row
_WARPS = 4
_GELU: tl.constexpr = tl.constexpr(
    -2 * 0.7978845608028654
)  # -2 sqrt(2 / pi); x / (1 + exp(-2 u)) is x / 2 (1 + tanh(u))


@triton.jit
def _row_tile(D: tl.constexpr, TILE: tl.constexpr):
    """Offsets of a row's values, [TILE, 256], and the mask of those that are inside the row."""
    at = tl.arange(0, TILE)[:, None] * 256 + tl.arange(0, 256)[None, :]
    return at, at < D


@triton.jit
def _store_row(y, out, scales, row, at, inside, D: tl.constexpr, TILE: tl.constexpr, ROTATED: tl.constexpr):
    """Store a float32 row in out's dtype, or as rotated int8 with its scale. y must be 0 outside the row."""
    out += row * D
    if ROTATED:
        store_row(y, out, scales, row, at, inside, TILE)
    else:
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_kernel(
    x, gain, shift, out, scales, stride, eps, D: tl.constexpr, TILE: tl.constexpr, ROTATED: tl.constexpr
):
    """(x - mean) / sqrt(variance + eps) * gain + shift."""
    row = tl.program_id(0).to(tl.int64)
    at, inside = _row_tile(D, TILE)
    values = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values) / D, 0.0)
    normed = centred * (1 / tl.sqrt(tl.sum(centred * centred) / D + eps))
    gained = normed * tl.load(gain + at, mask=inside, other=0.0) + tl.load(shift + at, mask=inside, other=0.0)
    _store_row(gained, out, scales, row, at, inside, D, TILE, ROTATED)


@triton.jit
def rms_norm_kernel(x, weight, cos, sin, out, stride, eps, D: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr):
    """x / sqrt(mean square + eps) * weight, then RoPE on heads of dimension 2 * HALF unless HALF is 0."""
    row = tl.program_id(0).to(tl.int64)
    at, inside = _row_tile(D, TILE)
    values = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    normed = values * (1 / tl.sqrt(tl.sum(values * values) / D + eps)) * tl.load(weight + at, mask=inside, other=0.0)
    if HALF > 0:
        pair = tl.arange(0, 128)[None, :] % HALF
        c, s = tl.load(cos + row * HALF + pair), tl.load(sin + row * HALF + pair)
        a, b = tl.split(tl.reshape(normed, (TILE, 128, 2)))
        normed = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (TILE, 256))
    _store_row(normed, out, out, row, at, inside, D, TILE, False)


@triton.jit(do_not_specialize=["count"])
def norm_silu_kernel(x, weight, out, count, x_stride, out_stride, eps, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    """silu(x / sqrt(mean square + eps) * weight) of `count` rows of a frame; frames are x_stride values apart."""
    frame, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    row, col = first + tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (row < count) & (col < D)
    values = tl.load(x + frame * x_stride + row * D + col, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 1) / D + eps)
    y = values * scale[:, None] * tl.load(weight + col, mask=col < D, other=0.0)
    y = y / (1 + tl.exp(-y))
    tl.store(out + frame * out_stride + row * D + col, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(x):
    return x / (1 + tl.exp((x + 0.044715 * x * x * x) * _GELU))


@triton.jit
def gelu_rotated_kernel(x, out, scales, stride, D: tl.constexpr, TILE: tl.constexpr):
    """tanh-GELU of a row, as rotated int8."""
    row = tl.program_id(0).to(tl.int64)
    at, inside = _row_tile(D, TILE)
    y = _gelu(tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32))
    _store_row(y, out, scales, row, at, inside, D, TILE, True)


@triton.jit
def quantize_kernel(x, out, scales, stride, D: tl.constexpr, TILE: tl.constexpr):
    """A row as rotated int8."""
    row = tl.program_id(0).to(tl.int64)
    at, inside = _row_tile(D, TILE)
    y = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    _store_row(y, out, scales, row, at, inside, D, TILE, True)


@triton.jit
def _places(stride, rows, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows and columns of a program's tile, and the mask of those that are inside the matrix."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    return row, col, (row < rows) & (col < D)


@triton.jit(do_not_specialize=["rows"])  # clips of all sizes share a kernel
def gelu_kernel(x, out, stride, rows, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """tanh-GELU."""
    row, col, inside = _places(stride, rows, D, ROWS, COLS)
    y = _gelu(tl.load(x + row * stride + col, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + row * D + col, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def add_gated_kernel(
    x, y, gate, out, x_stride, y_stride, rows, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """x + gate * y, or x + y if gate is None."""
    row, col, inside = _places(x_stride, rows, D, ROWS, COLS)
    total = tl.load(y + row * y_stride + col, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        total *= tl.load(gate + col, mask=col < D, other=0.0)
    total += tl.load(x + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + col, total.to(out.dtype.element_ty), mask=inside)


def row_tile(cols: int) -> int:
    """How many groups the tile of a row has: a power of two."""
    return 1 << (-(-cols // GROUP) - 1).bit_length()


def row_warps(cols: int) -> int:
    """How many warps a program with a whole row has: 32 values per thread."""
    return max(1, min(16, row_tile(cols) // 4))


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def layer_norm(
    x: Tensor, gain: Tensor, shift: Tensor, eps: float, rotated: bool = False, dtype: torch.dtype | None = None
) -> Tensor | RotatedInt8:
    """As `torch.elementwise.layer_norm`."""
    x, (rows, cols) = _rows(x), x.shape
    out, scales, result = _result(x, rotated, dtype or x.dtype)
    if rows:
        layer_norm_kernel[(rows,)](
            *(x, gain.float().contiguous(), shift.float().contiguous(), out, scales, x.stride(0), eps),
            *(cols, row_tile(cols), rotated),
            num_warps=row_warps(cols),
        )
    return result


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, rope: tuple[Tensor, Tensor] | None = None, out: Tensor | None = None
) -> Tensor:
    """As `torch.elementwise.rms_norm`. The head dimension must be a power of two and at most 256."""
    x, (rows, cols) = _rows(x), x.shape
    out = _place(x, out)
    cos, sin = (x, x) if rope is None else (table.contiguous() for table in rope)
    half = 0 if rope is None else cos.shape[1]
    if half and GROUP % (2 * half):
        raise ValueError(f"the head dimension {2 * half} does not divide {GROUP}")
    if rows:
        rms_norm_kernel[(rows,)](
            *(x, weight.float().contiguous(), cos, sin, out, x.stride(0), eps, cols, row_tile(cols), half),
            num_warps=row_warps(cols),
        )
    return out


def norm_silu(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """As `torch.elementwise.norm_silu`."""
    x, cols = x if x[0].is_contiguous() else x.contiguous(), x.shape[-1]
    assert out[0].is_contiguous()
    count, tile = x[0].numel() // cols, triton.next_power_of_2(cols)
    rows = max(1, _ROWS * _COLS // tile)
    norm_silu_kernel[triton.cdiv(count, rows), len(x)](
        *(x, weight.float().contiguous(), out, count, x.stride(0), out.stride(0), eps, cols, rows, tile),
        num_warps=_WARPS,
    )


def gelu(x: Tensor, rotated: bool = False, out: Tensor | None = None) -> Tensor | RotatedInt8:
    """As `torch.elementwise.gelu`."""
    x, (rows, cols) = _rows(x), x.shape
    if rotated:
        codes, scales, result = _result(x, True, x.dtype)
        if rows:
            gelu_rotated_kernel[(rows,)](x, codes, scales, x.stride(0), cols, row_tile(cols), num_warps=row_warps(cols))
        return result
    out = _place(x, out)
    if rows:
        gelu_kernel[_grid(rows, cols)](x, out, x.stride(0), rows, cols, _ROWS, _COLS, num_warps=_WARPS)
    return out


def quantize_rows(x: Tensor) -> RotatedInt8:
    """As `torch.int8.quantize_rows`."""
    flat = _rows(x.reshape(-1, x.shape[-1]))
    rows, cols = flat.shape
    out, scales, _ = _result(flat, True, x.dtype)
    if rows:
        quantize_kernel[(rows,)](flat, out, scales, flat.stride(0), cols, row_tile(cols), num_warps=row_warps(cols))
    return RotatedInt8(out.view(x.shape), scales.view(x.shape[:-1]), x.dtype)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """As `torch.elementwise.add_gated`."""
    x, y, (rows, cols) = _rows(x), _rows(y), x.shape
    out = _place(x, out)
    gate = None if gate is None else gate.float().contiguous()
    if rows:
        add_gated_kernel[_grid(rows, cols)](
            *(x, y, gate, out, x.stride(0), y.stride(0), rows, cols, _ROWS, _COLS), num_warps=_WARPS
        )
    return out


def _grid(rows: int, cols: int) -> tuple[int, int]:
    return triton.cdiv(rows, _ROWS), triton.cdiv(cols, _COLS)


def _place(x: Tensor, out: Tensor | None) -> Tensor:
    """Where a result of x's shape is written: `out`, whose rows lie one after the other, or new memory."""
    if out is None:
        return torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    assert out.shape == x.shape and out.is_contiguous(), "kernels write rows without gaps"
    return out


def _result(x: Tensor, rotated: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | RotatedInt8]:
    """The output and scale buffers that a kernel writes, and the result that the caller returns."""
    rows, cols = x.shape
    if not rotated:
        out = torch.empty((rows, cols), dtype=dtype, device=x.device)
        return out, out, out
    check_width(cols)
    codes = torch.empty((rows, cols), dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    return codes, scales, RotatedInt8(codes, scales, dtype)
