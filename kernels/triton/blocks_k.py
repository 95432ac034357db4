"""Decoders of the K types and of the IQ4 types, for `triton.blocks`.

In a tile, a row is a row of 16 bytes of codes. Each row has its own sub-scales, which are loaded four to a word.
"""

import triton
import triton.language as tl

from skyrun.kernels.triton.blocks_io import bytes_of, half, halves, plane, word


@triton.jit
def _rows(ROWS: tl.constexpr):
    return tl.arange(0, ROWS)[None, :, None]


@triton.jit
def _columns():
    return tl.arange(0, 16)[None, None, :]


@triton.jit
def _byte(packed, at):
    """Byte `at` of each word."""
    return (packed >> (at * 8)) & 255


@triton.jit
def _scales_and_mins(at, keep):
    """Scales and mins of Q4_K and Q5_K by row: (scale, min) of the low nibbles, then of the high nibbles."""
    row = _rows(8)
    d, m = halves(word(at, keep))
    first, second, third = word(at + 4, keep), word(at + 8, keep), word(at + 12, keep)
    early = row < 4  # the first four of the eight scales; the others store their top bits beside those
    scales = tl.where(early, first & 0x3F3F3F3F, (third & 0x0F0F0F0F) | ((first >> 2) & 0x30303030))
    mins = tl.where(early, second & 0x3F3F3F3F, ((third >> 4) & 0x0F0F0F0F) | ((second >> 2) & 0x30303030))
    low = row // 2 % 2 * 2
    return (
        d * _byte(scales, low).to(tl.float32),
        m * _byte(mins, low).to(tl.float32),
        d * _byte(scales, low + 1).to(tl.float32),
        m * _byte(mins, low + 1).to(tl.float32),
    )


@triton.jit
def q4_k(data, n, block, keep):
    """Blocks in ggml's layout: d, dmin, 12 bytes of scales and mins, 128 of codes."""
    at = data + block * 144
    d0, m0, d1, m1 = _scales_and_mins(at, keep)
    codes = bytes_of(at + 16, keep, 8)
    return (codes & 15).to(tl.float32) * d0 - m0, (codes >> 4).to(tl.float32) * d1 - m1


@triton.jit
def q5_k(data, n, block, keep):
    """Blocks in ggml's layout: that of Q4_K with 32 bytes of fifth bits before the codes."""
    at = data + block * 176
    d0, m0, d1, m1 = _scales_and_mins(at, keep)
    codes = bytes_of(at + 48, keep, 8).to(tl.int32)
    fifth = tl.load(at + 16 + _rows(8) % 2 * 16 + _columns(), mask=keep, other=0).to(tl.int32) >> (_rows(8) // 2 * 2)
    low = (codes & 15) | ((fifth & 1) << 4)
    high = (codes >> 4) | ((fifth & 2) << 3)
    return low.to(tl.float32) * d0 - m0, high.to(tl.float32) * d1 - m1


@triton.jit
def q6_k(data, n, block, keep):
    """Planes of 128 bytes of low nibbles, 64 of upper bits, 16 of scales, d."""
    row, column = _rows(4), _columns()
    start = plane(data, n, block, 0, 128) + row // 2 * 64 + row % 2 * 16 + column
    first = tl.load(start, mask=keep, other=0).to(tl.int32)
    second = tl.load(start + 32, mask=keep, other=0).to(tl.int32)
    top = bytes_of(plane(data, n, block, 128, 64), keep, 4).to(tl.int32)
    d = half(plane(data, n, block, 208, 2), keep)
    at = plane(data, n, block, 192, 16) + row // 2 * 8
    early, late = word(at, keep), word(at + 4, keep)
    return (
        _q6((first & 15) | ((top & 3) << 4), d, early, row % 2),
        _q6((second & 15) | ((top & 12) << 2), d, early, row % 2 + 2),
        _q6((first >> 4) | (top & 48), d, late, row % 2),
        _q6((second >> 4) | ((top & 192) >> 2), d, late, row % 2 + 2),
    )


@triton.jit
def _q6(codes, d, scales, at):
    scale = _byte(scales, at).to(tl.int8).to(tl.float32)
    return (codes - 32).to(tl.float32) * (d * scale)


@triton.jit
def q3_k(data, n, block, keep):
    """Planes of 64 bytes of low bits, 32 of third bits, 12 of scales, d."""
    row = _rows(4)
    group = row // 2
    codes = bytes_of(plane(data, n, block, 0, 64), keep, 4).to(tl.int32)
    mask = tl.load(plane(data, n, block, 64, 32) + row % 2 * 16 + _columns(), mask=keep, other=0).to(tl.int32)
    top = mask >> (group * 4)
    at = plane(data, n, block, 96, 12)
    high = word(at + 8, keep) >> (group * 4)
    early = ((word(at, keep) >> (group * 4)) & 0x0F0F0F0F) | ((high & 0x03030303) << 4)
    late = ((word(at + 4, keep) >> (group * 4)) & 0x0F0F0F0F) | (((high >> 2) & 0x03030303) << 4)
    d = half(plane(data, n, block, 108, 2), keep)
    return (
        _q3((codes & 3) | ((top & 1) << 2), d, early, row % 2),
        _q3(((codes >> 2) & 3) | ((top & 2) << 1), d, early, row % 2 + 2),
        _q3(((codes >> 4) & 3) | (top & 4), d, late, row % 2),
        _q3((codes >> 6) | ((top & 8) >> 1), d, late, row % 2 + 2),
    )


@triton.jit
def _q3(codes, d, scales, at):
    return (codes - 4).to(tl.float32) * (d * (_byte(scales, at) - 32).to(tl.float32))


@triton.jit
def q2_k(data, n, block, keep):
    """Planes of 64 bytes of codes, 16 of scales and mins, d and dmin."""
    row = _rows(4)
    codes = bytes_of(plane(data, n, block, 0, 64), keep, 4)
    at = plane(data, n, block, 64, 16) + row // 2 * 8
    early, late = word(at, keep), word(at + 4, keep)
    d, m = halves(word(plane(data, n, block, 80, 4), keep))
    return (
        _q2(codes & 3, d, m, early, row % 2),
        _q2((codes >> 2) & 3, d, m, early, row % 2 + 2),
        _q2((codes >> 4) & 3, d, m, late, row % 2),
        _q2(codes >> 6, d, m, late, row % 2 + 2),
    )


@triton.jit
def _q2(codes, d, m, scales, at):
    scale = _byte(scales, at)
    return codes.to(tl.float32) * (d * (scale & 15).to(tl.float32)) - m * (scale >> 4).to(tl.float32)


@triton.jit
def _iq4_value(codes):
    """Entry `codes` of IQ4's table: the rounded value of a polynomial that is within 0.45 of every entry.

    This needs no memory for the table and no comparisons. Adding 1.5 * 2^23 rounds to an integer.
    """
    x = codes.to(tl.float32)
    slope = ((1.4480e-3 * x + 3.6273e-2) * x - 1.4386) * x + 24.501
    return (slope * x + (12582912 - 127)) - 12582912


@triton.jit
def iq4_nl(data, n, block, keep):
    """Planes of 16 bytes of codes, d."""
    codes = bytes_of(plane(data, n, block, 0, 16), keep, 1)
    d = half(plane(data, n, block, 16, 2), keep)
    return _iq4_value(codes & 15) * d, _iq4_value(codes >> 4) * d


@triton.jit
def iq4_xs(data, n, block, keep):
    """Planes of 128 bytes of codes, four of low scale bits, two of upper ones, d."""
    row = _rows(8)
    codes = bytes_of(plane(data, n, block, 0, 128), keep, 8)
    low = word(plane(data, n, block, 128, 4), keep) >> (row * 4)
    high = tl.load(plane(data, n, block, 132, 2).to(tl.pointer_type(tl.int16)), mask=keep, other=0).to(tl.int32)
    d = half(plane(data, n, block, 134, 2), keep)
    scale = d * (((low & 15) | (((high >> (row * 2)) & 3) << 4)) - 32).to(tl.float32)
    return _iq4_value(codes & 15) * scale, _iq4_value(codes >> 4) * scale
