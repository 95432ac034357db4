"""The fast path in plain torch: rows turned by a Hadamard matrix, in int8, and their products.

The regular Hadamard matrix of order 16 is R16[i, j] = r(i // 4, j // 4) r(i % 4, j % 4) with r(a, b) = -1 where
a + b = 3, else 1: symmetric, with equal row sums, so that a mean does not become an outlier (ConvRot). A group of 256
numbers, as a 16 x 16 matrix X, becomes R16 X^T R16 / 16. The matrix is orthogonal: products of turned rows are those of
the rows.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.rotated import RotatedInt8, check_width
from skyrun.kernels.weight import QuantizedWeight

_LEVELS = 127
_CHUNK_ROWS = 4096  # of a product at a time
_CUDA_ROWS, _CUDA_COLS = 17, 8  # cuBLAS multiplies no fewer rows than that, and multiples of that many columns
_SIDE = 16  # a group is a matrix of _SIDE x _SIDE


@lru_cache
def _hadamard(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        four = 1 - 2 * torch.eye(4, dtype=dtype).flip(0)
        return torch.kron(four, four).to(device)


def rotate(x: Tensor) -> Tensor:
    """x [..., cols], cols a multiple of 256 -> turned, of x's dtype, which should be float32 or float64.

    Turning twice gives x again.
    """
    hadamard = _hadamard(x.dtype, x.device)
    first = x.reshape(-1, _SIDE) @ hadamard
    crossed = first.view(-1, _SIDE, _SIDE).mT.reshape(-1, _SIDE)
    return (crossed @ hadamard).div_(_SIDE).view(x.shape)


def quantize_rows(x: Tensor) -> RotatedInt8:
    """x [..., cols] -> its rows turned and rounded to 127 levels each side, one scale per row."""
    check_width(x.shape[-1])
    turned = rotate(x.float())
    scales = turned.abs().amax(-1) / _LEVELS
    codes = (turned / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().to(torch.int8)
    return RotatedInt8(codes, scales, x.dtype)


def encode_weight(weight: QuantizedWeight) -> RotatedInt8:
    """A weight [rows, cols] in rotated int8."""
    return quantize_rows(weight.dense(torch.float32))


def multiply(
    x: RotatedInt8,
    weight: RotatedInt8,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [L, cols] times weight [rows, cols] transposed, plus bias [rows]; with a residual, residual + gate * that.

    In x's dtype, rounded once. Rows are taken in turn, so that the int32 product is never whole in memory.
    """
    out = torch.empty(len(x.codes), len(weight.codes), dtype=x.dtype, device=x.codes.device)
    transposed = _padded(weight.codes, -len(weight.codes) % _CUDA_COLS).T
    for start in range(0, len(out), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        product = _sums(x.codes[part], transposed)[:, : out.shape[1]].float()
        product *= x.scales[part].unsqueeze(1)
        product *= weight.scales
        if bias is not None:
            product += bias
        if gate is not None:
            product *= gate
        if residual is not None:
            product += residual[part]
        out[part] = product
    return out


def _sums(codes: Tensor, transposed: Tensor) -> Tensor:
    """int8 [L, cols] times int8 [cols, rows] -> int32 [L, rows]."""
    return torch._int_mm(_padded(codes, _CUDA_ROWS - len(codes)), transposed)[: len(codes)]


def _padded(codes: Tensor, rows: int) -> Tensor:
    """With so many more rows of zeros, if any are missing."""
    return F.pad(codes, (0, 0, 0, rows)) if rows > 0 else codes
