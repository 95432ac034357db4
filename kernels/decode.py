"""Decode block bytes to values, with the kernels of the device that holds them."""

import torch
from torch import Tensor

from skyrun.kernels.formats import block_format
from skyrun.kernels.machine.device import uses_triton
from skyrun.kernels.torch import decode as torch_decode


def dequantize(blocks: Tensor, type: str, dtype: torch.dtype = torch.float32, planar: bool = False) -> Tensor:
    """Decode rows of blocks -> `dtype` [..., cols].

    Args:
        blocks: uint8 [..., row_bytes] on any device.
        type: the GGUF type of the blocks.
        dtype: of the result. float32 equals ggml's values exactly; other dtypes are those values, rounded once.
        planar: whether `blocks` is a whole tensor as `planes.to_planes` returns it.

    Raises SkyrunError for an unknown type or a row that is not a whole number of blocks.
    """
    if block_format(type).block_size > 1 and uses_triton(blocks.device):
        from skyrun.kernels.triton import decode as triton_decode

        return triton_decode.dequantize(blocks, type, dtype, planar)
    return torch_decode.dequantize(blocks, type, dtype, planar)
