"""The operations that `elementwise` describes, in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.rotated import RotatedInt8
from skyrun.kernels.torch.int8 import quantize_rows

_CACHED = 1 << 19  # values


def layer_norm(
    x: Tensor, gain: Tensor, shift: Tensor, eps: float, rotated: bool = False, dtype: torch.dtype | None = None
) -> Tensor | RotatedInt8:
    """(x - mean) / sqrt(variance + eps) * gain + shift over the last axis."""
    normed = F.layer_norm(x.float(), (x.shape[-1],), None, None, eps) * gain + shift
    return _as(quantize_rows(normed), dtype or x.dtype) if rotated else normed.to(dtype or x.dtype)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, rope: tuple[Tensor, Tensor] | None = None, out: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean square + eps) * weight over the last axis, then neighbouring pairs rotated by the token's angle."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), weight, eps)
    if rope is None:
        return normed.to(x.dtype) if out is None else out.copy_(normed)
    cos, sin = (table.unsqueeze(1) for table in rope)
    half = cos.shape[-1]
    pairs = (len(x), x.shape[-1] // (2 * half), half, 2)
    a, b = normed.view(pairs).unbind(3)
    rotated = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    real, imaginary = rotated.view(pairs).unbind(3)
    real.copy_((a * cos).sub_(b * sin))
    imaginary.copy_((a * sin).add_(b * cos))
    return rotated


def norm_silu(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out = silu(x / sqrt(mean square + eps) * weight) over the last axis."""
    for frame, place in zip(x.unbind(), out.unbind(), strict=True):
        for part, result in zip(_parts(frame), _parts(place), strict=True):
            scale = torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=torch.float32)
            scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            normed = result if out.dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
            F.silu(torch.mul(part, scale, out=normed).mul_(weight), inplace=True)
            if normed is not result:
                result.copy_(normed)


def _parts(frame: Tensor) -> tuple[Tensor, ...]:
    """The rows of a frame in parts that stay in a CPU's cache from one operation to the next."""
    rows = frame.flatten(0, -2)
    return rows.split(max(1, _CACHED // rows.shape[1])) if rows.device.type == "cpu" else (rows,)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x + gate * y."""
    total = x + y if gate is None else torch.mul(y, gate).add_(x)
    return total.to(x.dtype) if out is None else out.copy_(total)


def gelu(x: Tensor, rotated: bool = False, out: Tensor | None = None) -> Tensor | RotatedInt8:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    if rotated:
        return _as(quantize_rows(F.gelu(x.float(), approximate="tanh")), x.dtype)
    if out is None:
        return F.gelu(x, approximate="tanh")
    torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    return out


def _as(rows: RotatedInt8, dtype: torch.dtype) -> RotatedInt8:
    return RotatedInt8(rows.codes, rows.scales, dtype)
