"""Rotation and rounding inside kernels, as `torch.int8` defines them. The rotation's matmuls run on tensor cores."""

import triton
import triton.language as tl

_SIDE: tl.constexpr = tl.constexpr(16)
_SMALLEST: tl.constexpr = tl.constexpr(1.2e-38)  # the inverses of smaller values overflow float32
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
    """Rotate x float32 [GROUPS, 256] with |x| <= 1 -> float32 [GROUPS, 256] with |y| <= 16.

    The bound keeps the intermediate results inside float16.
    """
    matrix = hadamard()
    first = tl.dot(tl.reshape(x.to(tl.float16), (GROUPS * _SIDE, _SIDE)), matrix)
    crossed = tl.trans(tl.reshape(first.to(tl.float16), (GROUPS, _SIDE, _SIDE)), (0, 2, 1))
    second = tl.dot(tl.reshape(crossed, (GROUPS * _SIDE, _SIDE)), matrix)
    return tl.reshape(second, (GROUPS, _SIDE * _SIDE)) * (1.0 / _SIDE)


@triton.jit
def to_codes(y, inverse):
    """y * inverse, rounded to int8. inverse is 127 / absmax, so that no code exceeds 127."""
    rounded = y * inverse + _TO_INTEGER
    return (rounded - _TO_INTEGER).to(tl.int8)


@triton.jit
def store_row(y, codes, scales, row, at, inside, GROUPS: tl.constexpr):
    """Store row y, float32 [GROUPS, 256], as rotated int8 at codes + at and scales + row. y is 0 where not `inside`."""
    largest = tl.max(tl.abs(y))
    bound = tl.where(largest > _SMALLEST, largest, 1.0)
    rotated = rotate(y * (1 / bound), GROUPS)
    peak = tl.max(tl.abs(rotated))
    tl.store(codes + at, to_codes(rotated, 127 / tl.where(peak > 0, peak, 1.0)), mask=inside)
    # An infinite or NaN value makes the scale NaN: the maximum may miss NaN, this sum does not.
    tl.store(scales + row, peak * bound / 127 + tl.sum(y * 0.0))
