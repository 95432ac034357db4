"""The fast path in plain torch: rows turned by a Hadamard matrix, in int8, and their products.

The regular Hadamard matrix of order 16 is R16[i, j] = r(i // 4, j // 4) r(i % 4, j % 4) with r(a, b) = -1 where
a + b = 3, else 1: symmetric, with equal row sums, so that a mean does not become an outlier (ConvRot). A group of 256
numbers, as a 16 x 16 matrix X, becomes R16 X^T R16 / 16. The matrix is orthogonal: products of turned rows are those of
the rows.
"""

from functools import lru_cache

import torch
from torch import Tensor

from skyrun.kernels.rotated import GROUP, RotatedInt8

_LEVELS = 127
_SIDE = 16  # a group is a matrix of _SIDE x _SIDE


@lru_cache
def _hadamard(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        four = 1 - 2 * torch.eye(4, dtype=dtype).flip(0)
        return torch.kron(four, four).to(device)


def rotate(x: Tensor) -> Tensor:
    """x [..., cols], cols a multiple of 256 -> turned, of x's dtype, which should be float32 or float64."""
    hadamard = _hadamard(x.dtype, x.device)
    groups = x.unflatten(-1, (-1, _SIDE, _SIDE)).mT
    turned: Tensor = hadamard @ groups @ hadamard / _SIDE
    return turned.flatten(-3)


def rotate_back(y: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    hadamard = _hadamard(y.dtype, y.device)
    groups = y.unflatten(-1, (-1, _SIDE, _SIDE))
    turned: Tensor = hadamard @ groups @ hadamard / _SIDE
    return turned.mT.flatten(-3)


def quantize_rows(x: Tensor) -> RotatedInt8:
    """x [..., cols] -> its rows turned and rounded to 127 levels each side, one scale per row."""
    if x.shape[-1] % GROUP:
        raise ValueError(f"rows of {x.shape[-1]} are not whole groups of {GROUP}")
    turned = rotate(x.float())
    scales = turned.abs().amax(-1) / _LEVELS
    codes = (turned / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().to(torch.int8)
    return RotatedInt8(codes, scales, x.dtype)
