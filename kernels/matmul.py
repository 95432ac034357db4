"""Multiply activations with a weight that may still be in block form."""

from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.weight import QuantizedWeight


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., cols] times weight [rows, cols] transposed, plus bias [rows] -> [..., rows], in x's dtype."""
    dense = weight.dense(x.dtype) if isinstance(weight, QuantizedWeight) else weight.to(x.dtype)
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))
