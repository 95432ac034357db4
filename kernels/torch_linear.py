"""Multiply activations with a weight that may still be in block form."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.formats import block_format
from skyrun.kernels.torch_decode import dequantize


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix in block form: data uint8 [rows, row_bytes] of GGUF type `type`."""

    data: Tensor
    type: str

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the matrix that the blocks stand for."""
        format = block_format(self.type)
        return self.data.shape[0], self.data.shape[1] // format.block_bytes * format.block_size

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded matrix, `dtype` [rows, cols]."""
        return dequantize(self.data, self.type, dtype)


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., cols] times weight [rows, cols] transposed, plus bias [rows] -> [..., rows], in x's dtype."""
    dense = weight.dense(x.dtype) if isinstance(weight, QuantizedWeight) else weight.to(x.dtype)
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))
