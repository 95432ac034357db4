"""Rotation and rounding inside kernels, as `torch_int8` defines them. The tiles' products run on tensor cores."""

import triton
import triton.language as tl

_SIDE: tl.constexpr = tl.constexpr(16)
_SMALLEST: tl.constexpr = tl.constexpr(1.2e-38)  # that can be divided by: below, float32 has no inverse
_TO_INTEGER: tl.constexpr = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: adding it rounds a float32 to an integer, half to even


@triton.jit
def hadamard():
    """The regular Hadamard matrix of order 16, entries +-1, float16 [16, 16]."""
    row = tl.arange(0, 16)[:, None]
    col = tl.arange(0, 16)[None, :]
    low = tl.where((row & 3) + (col & 3) == 3, -1.0, 1.0)
    high = tl.where((row >> 2) + (col >> 2) == 3, -1.0, 1.0)
    return (low * high).to(tl.float16)


@triton.jit
def rotate(x, GROUPS: tl.constexpr):
    """x float32 [GROUPS, 256] with |x| <= 1 -> turned float32 [GROUPS, 256], |y| <= 16.

    The bound keeps the products inside float16.
    """
    turn = hadamard()
    first = tl.dot(tl.reshape(x.to(tl.float16), (GROUPS * _SIDE, _SIDE)), turn)
    crossed = tl.trans(tl.reshape(first.to(tl.float16), (GROUPS, _SIDE, _SIDE)), (0, 2, 1))
    second = tl.dot(tl.reshape(crossed, (GROUPS * _SIDE, _SIDE)), turn)
    return tl.reshape(second, (GROUPS, _SIDE * _SIDE)) * (1.0 / _SIDE)


@triton.jit
def to_codes(y, inverse):
    """y * inverse rounded to int8; inverse is 127 / absmax, so that nothing exceeds 127."""
    rounded = y * inverse + _TO_INTEGER
    return (rounded - _TO_INTEGER).to(tl.int8)


@triton.jit
def store_row(y, codes, scales, row, at, inside, GROUPS: tl.constexpr):
    """A row y, float32 [GROUPS, 256], in rotated int8 at codes + at and scales + row. y is 0 where not `inside`."""
    largest = tl.max(tl.abs(y))
    bound = tl.where(largest > _SMALLEST, largest, 1.0)
    turned = rotate(y * (1 / bound), GROUPS)
    peak = tl.max(tl.abs(turned))
    tl.store(codes + at, to_codes(turned, 127 / tl.where(peak > 0, peak, 1.0)), mask=inside)
    # What is infinite or NaN makes the scale NaN: a maximum may overlook it, this sum does not.
    tl.store(scales + row, peak * bound / 127 + tl.sum(y * 0.0))
