"""The fast path in plain torch: rows are rotated by a Hadamard matrix, quantized to int8 and multiplied.

The regular Hadamard matrix of order 16 is R16[i, j] = r(i // 4, j // 4) r(i % 4, j % 4) with r(a, b) = -1 where
a + b = 3, else 1. It is symmetric with equal row sums, so that a mean does not become an outlier (ConvRot). A group of
256 values, seen as a 16 x 16 matrix X, becomes R16 X^T R16 / 16. This map is orthogonal, so dot products of rotated
rows equal those of the rows.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.rotated import RotatedInt8, check_width
from skyrun.kernels.weight import QuantizedWeight

_LEVELS = 127
_CHUNK_ROWS = 4096  # that are multiplied at a time
_CUDA_ROWS, _CUDA_COLS = 17, 8  # torch._int_mm on CUDA needs at least 17 rows, and columns in multiples of 8
_SIDE = 16  # a group is a matrix of _SIDE x _SIDE


@lru_cache
def _hadamard(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        four = 1 - 2 * torch.eye(4, dtype=dtype).flip(0)
        return torch.kron(four, four).to(device)


def rotate(x: Tensor) -> Tensor:
    """Rotate the rows of x [..., cols], where cols is a multiple of 256, in x's dtype: float32 or float64.

    Rotating twice gives x again.
    """
    hadamard = _hadamard(x.dtype, x.device)
    first = x.reshape(-1, _SIDE) @ hadamard
    crossed = first.view(-1, _SIDE, _SIDE).mT.reshape(-1, _SIDE)
    return (crossed @ hadamard).div_(_SIDE).view(x.shape)


def quantize_rows(x: Tensor) -> RotatedInt8:
    """Rotate the rows of x [..., cols] and round them to integers in [-127, 127], with one scale per row."""
    check_width(x.shape[-1])
    rotated = rotate(x.float())
    scales = rotated.abs().amax(-1) / _LEVELS
    codes = (rotated / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().to(torch.int8)
    return RotatedInt8(codes, scales, x.dtype)


def encode_weight(weight: QuantizedWeight) -> RotatedInt8:
    """Decode a weight [rows, cols] and encode it as rotated int8."""
    return quantize_rows(weight.dense(torch.float32))


def multiply(
    x: RotatedInt8,
    weight: RotatedInt8,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = x [L, cols] @ weight [rows, cols]^T + bias, or residual + gate * y with a residual; x's dtype, rounded once.

    Rows are multiplied in chunks, so that the int32 result is never whole in memory. Parameters as in `matmul.linear`.
    """
    out = torch.empty(len(x.codes), len(weight.codes), dtype=x.dtype, device=x.codes.device)
    transposed = _padded(weight.codes, -len(weight.codes) % _CUDA_COLS).T
    for start in range(0, len(out), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        y = _int_matmul(x.codes[part], transposed)[:, : out.shape[1]].float()
        y *= x.scales[part].unsqueeze(1)
        y *= weight.scales
        if bias is not None:
            y += bias
        if gate is not None:
            y *= gate
        if residual is not None:
            y += residual[part]
        out[part] = y
    return out


def _int_matmul(codes: Tensor, transposed: Tensor) -> Tensor:
    """int8 [L, cols] @ int8 [cols, rows] -> int32 [L, rows]."""
    return torch._int_mm(_padded(codes, _CUDA_ROWS - len(codes)), transposed)[: len(codes)]


def _padded(codes: Tensor, rows: int) -> Tensor:
    """codes with `rows` more rows of zeros; unchanged if `rows` is not positive."""
    return F.pad(codes, (0, 0, 0, rows)) if rows > 0 else codes
