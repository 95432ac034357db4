"""Loads that the block decoders share. Pointers are uint8, one per block: [NB, 1, 1]."""

import triton
import triton.language as tl


@triton.jit
def plane(data, n, block, START: tl.constexpr, WIDTH: tl.constexpr):
    """The address of each block's field in its plane, see `planes`."""
    return data + n * START + block * WIDTH


@triton.jit
def bytes_of(at, keep, ROWS: tl.constexpr):
    """Load 16 * ROWS bytes of each block: uint8 [NB, ROWS, 16]."""
    row = tl.arange(0, ROWS)[None, :, None]
    return tl.load(at + row * 16 + tl.arange(0, 16)[None, None, :], mask=keep, other=0)


@triton.jit
def half(at, keep):
    """Load a float16, as float32."""
    return tl.load(at.to(tl.pointer_type(tl.float16)), mask=keep, other=0).to(tl.float32)


@triton.jit
def word(at, keep):
    """Load four bytes as a little-endian int32."""
    return tl.load(at.to(tl.pointer_type(tl.int32)), mask=keep, other=0)


@triton.jit
def halves(pair):
    """The two float16 in a word, as float32."""
    low = pair.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)
