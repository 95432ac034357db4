"""The operations that `elementwise` describes, in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.rotated import RotatedInt8
from skyrun.kernels.torch_int8 import quantize_rows


def layer_norm(x: Tensor, gain: Tensor, shift: Tensor, eps: float, rotated: bool = False) -> Tensor | RotatedInt8:
    """(x - mean) / sqrt(variance + eps) * gain + shift over the last axis."""
    normed = F.layer_norm(x.float(), (x.shape[-1],), None, None, eps) * gain + shift
    return _as(quantize_rows(normed), x.dtype) if rotated else normed.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x / sqrt(mean square + eps) * weight over the last axis, then neighbouring pairs rotated by the token's angle."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), weight, eps)
    if rope is None:
        return normed.to(x.dtype)
    cos, sin = (table.unsqueeze(1) for table in rope)
    half = cos.shape[-1]
    pairs = (len(x), x.shape[-1] // (2 * half), half, 2)
    a, b = normed.view(pairs).unbind(3)
    rotated = torch.empty_like(x, memory_format=torch.contiguous_format)
    real, imaginary = rotated.view(pairs).unbind(3)
    real.copy_(a * cos - b * sin)
    imaginary.copy_(a * sin + b * cos)
    return rotated


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate * y."""
    if gate is None:
        return (x + y).to(x.dtype)
    return torch.mul(y, gate).add_(x).to(x.dtype)


def gelu(x: Tensor, rotated: bool = False) -> Tensor | RotatedInt8:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    if rotated:
        return _as(quantize_rows(F.gelu(x.float(), approximate="tanh")), x.dtype)
    return F.gelu(x, approximate="tanh")


def _as(rows: RotatedInt8, dtype: torch.dtype) -> RotatedInt8:
    return RotatedInt8(rows.codes, rows.scales, dtype)
