"""Decode block bytes to values in Triton: the twin of `torch.decode`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skyrun.kernels.formats import block_format
from skyrun.kernels.planes import decoded_shape, needs_planes, to_planes
from skyrun.kernels.triton.blocks import PIECES, decode

WARPS = 4
TILE = 4096  # values that a program decodes


@triton.jit(do_not_specialize=["n"])  # n = 1 must not compile a kernel of its own
def decode_kernel(
    data,
    out,
    n,
    TYPE: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    NB: tl.constexpr,
):
    """Decode the n blocks at `data` to values at `out`. One program decodes NB blocks."""
    block = tl.program_id(0).to(tl.int64) * NB + tl.arange(0, NB)
    keep = block < n
    pieces = decode(data, n.to(tl.int64), block, keep, TYPE)
    row = tl.arange(0, ROWS)[None, :, None]
    start = out + block[:, None, None] * (COUNT * ROWS * 16)
    start += row // RUN * (COUNT * RUN * 16) + row % RUN * 16 + tl.arange(0, 16)[None, None, :]
    for piece in tl.static_range(COUNT):
        tl.store(start + piece * (RUN * 16), pieces[piece].to(out.dtype.element_ty), mask=keep[:, None, None])


def constants(type: str, tile: int = TILE) -> dict[str, int | str]:
    """The kernel's constexpr arguments."""
    pieces = PIECES[type]
    blocks = tile // block_format(type).block_size
    return {"TYPE": type, "COUNT": pieces.count, "ROWS": pieces.rows, "RUN": pieces.run, "NB": blocks}


def aligned(blocks: Tensor, type: str, planar: bool) -> Tensor:
    """The blocks as kernels read them: in planes if the type needs them, and aligned for wide loads."""
    data = blocks.contiguous()
    if needs_planes(type) and not planar:
        return to_planes(data, type)
    return data.clone() if data.data_ptr() % 16 else data


def dequantize(blocks: Tensor, type: str, dtype: torch.dtype = torch.float32, planar: bool = False) -> Tensor:
    """As `torch.decode.dequantize` for block types, bit for bit."""
    return _dequantize(blocks, type, dtype, planar, TILE)


def _dequantize(blocks: Tensor, type: str, dtype: torch.dtype, planar: bool, tile: int) -> Tensor:
    out = torch.empty(decoded_shape(blocks, type), dtype=dtype, device=blocks.device)
    n = out.numel() // block_format(type).block_size
    if n:
        fixed = constants(type, tile)
        decode_kernel[(triton.cdiv(n, fixed["NB"]),)](
            aligned(blocks, type, planar), out, n, **fixed, num_warps=WARPS, enable_fp_fusion=True
        )
    return out
