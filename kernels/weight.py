"""A weight matrix whose numbers are still in block form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skyrun.kernels.decode import dequantize
from skyrun.kernels.formats import block_format


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix in block form: data uint8 [rows, row_bytes] of GGUF type `type`.

    planar: the blocks' fields lie apart, see `planes`. fast: multiply in rotated int8, see `linear`. name: the
    tensor's in its file.
    """

    data: Tensor
    type: str
    planar: bool = False
    fast: bool = False
    name: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the matrix that the blocks stand for."""
        format = block_format(self.type)
        return self.data.shape[0], self.data.shape[1] // format.block_bytes * format.block_size

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded matrix, `dtype` [rows, cols]."""
        return dequantize(self.data, self.type, dtype, self.planar)
