"""Elementwise and row-wise operations between matmuls, with the kernels of the device: each is one pass over memory.

Shapes: L tokens, D width. Sums are computed in float32, results have x's dtype. With `rotated` the result is rotated
int8, the input of linear layers that are `fast`; D must then be a multiple of 256. With `out` the result is written
there, in its dtype: rows without gaps, which may be an argument's own memory.
"""

from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from skyrun.kernels.machine.device import uses_triton
from skyrun.kernels.rotated import RotatedInt8
from skyrun.kernels.torch import elementwise as torch_elementwise

Rope = tuple[Tensor, Tensor]


def layer_norm(
    x: Tensor, gain: Tensor, shift: Tensor, eps: float, rotated: bool = False, dtype: torch.dtype | None = None
) -> Tensor | RotatedInt8:
    """(x - mean) / sqrt(variance + eps) * gain + shift. x [L, D], gain and shift [D]. dtype: of the result, if not x's.

    Of rotated rows it is the dtype that products with them have.
    """
    return cast(Tensor | RotatedInt8, _twin(x.device).layer_norm(x, gain, shift, eps, rotated, dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float, rope: Rope | None = None, out: Tensor | None = None) -> Tensor:
    """x / sqrt(mean square + eps) * weight over the full width, then the rotary embedding. x [L, D], weight [D].

    rope: cosines and sines [L, d / 2] for heads of dimension d. Each neighbouring pair (a, b) of a head becomes
    (a cos - b sin, a sin + b cos).
    """
    return cast(Tensor, _twin(x.device).rms_norm(x, weight, eps, rope, out))


def gelu(x: Tensor, rotated: bool = False, out: Tensor | None = None) -> Tensor | RotatedInt8:
    """GELU in its tanh approximation, x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). x [L, D]."""
    return cast(Tensor | RotatedInt8, _twin(x.device).gelu(x, rotated, out))


def norm_silu(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out = silu(x / sqrt(mean square + eps) * weight) over the channels. x and out [T, H, W, D], weight [D].

    Frames are apart from each other, their rows are contiguous.
    """
    _twin(x.device).norm_silu(x, weight, eps, out)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x + gate * y, or x + y without a gate. x and y [L, D], gate [D]."""
    return cast(Tensor, _twin(x.device).add_gated(x, y, gate, out))


def quantize_rows(x: Tensor) -> RotatedInt8:
    """Rotate the rows of x [..., D] and quantize them to int8."""
    return cast(RotatedInt8, _twin(x.device).quantize_rows(x))


def _twin(device: torch.device) -> ModuleType:
    if not uses_triton(device):
        return torch_elementwise
    from skyrun.kernels.triton import elementwise as triton_elementwise

    return triton_elementwise
