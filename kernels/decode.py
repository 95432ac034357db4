"""Block bytes to numbers, with the kernels of the device that they are on."""

import torch
from torch import Tensor

from skyrun.kernels import torch_decode


def dequantize(blocks: Tensor, type: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode rows of blocks.

    blocks: uint8 [..., row_bytes] on any device. Returns `dtype` [..., cols]; float32 equals ggml's values exactly,
    other dtypes are those values rounded once. Raises SkyrunError for an unknown type or a row that is not a whole
    number of blocks.
    """
    return torch_decode.dequantize(blocks, type, dtype)
