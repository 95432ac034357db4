"""A quantized weight matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skyrun.kernels.decode import dequantize
from skyrun.kernels.formats import block_format


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix: data uint8 [rows, row_bytes] of GGUF type `type`.

    planar: whether the blocks were repacked into planes, see `planes`. fast: whether `linear` multiplies it in rotated
    int8. name: the tensor's name in its file.
    """

    data: Tensor
    type: str
    planar: bool = False
    fast: bool = False
    name: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the decoded matrix."""
        format = block_format(self.type)
        return self.data.shape[0], self.data.shape[1] // format.block_bytes * format.block_size

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded matrix, `dtype` [rows, cols]."""
        return dequantize(self.data, self.type, dtype, self.planar)
