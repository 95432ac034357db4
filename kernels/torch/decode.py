"""Decode block bytes with plain torch, on any device: the reference for the Triton kernels, and their fallback.

Every decoder takes blocks uint8 [n, block_bytes] and returns float32 [n, block_size]. Layouts and formulas are those of
ggml (ggml-common.h, ggml-quants.c). Scale, sub-scale and code multiply exactly in float32 and at most one addition
follows, so the values equal ggml's bit for bit.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from skyrun.kernels.formats import block_format
from skyrun.kernels.planes import decoded_shape, from_planes

_CHUNK_WEIGHTS = 1 << 21  # decoded at a time: temporaries stay in the CPU's cache and add little to the memory peak

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@lru_cache
def _constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor, made once per device: making one on a GPU blocks the host."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 stored at byte `at` of every block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _shifted(codes: Tensor, shifts: range | tuple[int, ...], mask: int) -> Tensor:
    """Extract bit fields: uint8 [n, groups, width] -> int8 [n, groups, len(shifts), width]."""
    by = _constant(tuple(shifts), torch.uint8, codes.device).view(1, 1, -1, 1)
    return ((codes.unsqueeze(2) >> by) & mask).to(torch.int8)


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 [n, 16] -> int8 [n, 32]: all low nibbles first, then all high ones."""
    return _shifted(codes.unsqueeze(1), (0, 4), 15).flatten(1)


def _bits(plane: Tensor) -> Tensor:
    """uint8 [n, 4] -> int8 [n, 32]: one bit per weight, lowest first."""
    by = _constant(tuple(range(8)), torch.uint8, plane.device)
    return ((plane.unsqueeze(2) >> by) & 1).to(torch.int8).flatten(1)


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * b[:, 2:].view(torch.int8)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]) - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:]) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | (_bits(b[:, 2:6]) << 4)) - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | (_bits(b[:, 4:8]) << 4)) + _half(b, 2)


def _q2_k(b: Tensor) -> Tensor:
    scales, codes = b[:, :16], b[:, 16:80]
    q = _shifted(codes.view(-1, 2, 32), (0, 2, 4, 6), 3).view(-1, 16, 16)
    d = _half(b, 80) * (scales & 15)
    m = _half(b, 82) * (scales >> 4)
    return (d.unsqueeze(2) * q - m.unsqueeze(2)).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    high, codes, packed = b[:, :32], b[:, 32:96], b[:, 96:108]
    low_bits = _shifted(packed[:, None, :8], (0, 4), 15).flatten(1)
    high_bits = _shifted(packed[:, None, 8:], (0, 2, 4, 6), 3).flatten(1)
    scales = (low_bits | (high_bits << 4)) - 32
    q = _shifted(codes.reshape(-1, 2, 32), (0, 2, 4, 6), 3).view(-1, 8, 32)
    top = _shifted(high.unsqueeze(1), range(8), 1).view(-1, 8, 32)
    q = (q - ((top ^ 1) << 2)).view(-1, 16, 16)
    return ((_half(b, 108) * scales).unsqueeze(2) * q).flatten(1)


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and mins that Q4_K and Q5_K pack into uint8 [n, 12]."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), 1)
    mins = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1)
    return scales, mins


def _q4_k(b: Tensor) -> Tensor:
    scales, mins = _scales_and_mins(b[:, 4:16])
    q = _shifted(b[:, 16:].reshape(-1, 4, 32), (0, 4), 15).view(-1, 8, 32)
    d, m = _half(b, 0) * scales, _half(b, 2) * mins
    return (d.unsqueeze(2) * q - m.unsqueeze(2)).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    scales, mins = _scales_and_mins(b[:, 4:16])
    q = _shifted(b[:, 48:].reshape(-1, 4, 32), (0, 4), 15).view(-1, 8, 32)
    q = q | (_shifted(b[:, None, 16:48], range(8), 1).view(-1, 8, 32) << 4)
    d, m = _half(b, 0) * scales, _half(b, 2) * mins
    return (d.unsqueeze(2) * q - m.unsqueeze(2)).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    low = _shifted(b[:, :128].reshape(-1, 2, 64), (0, 4), 15).view(-1, 8, 32)
    high = _shifted(b[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).view(-1, 8, 32)
    q = ((low | (high << 4)) - 32).view(-1, 16, 16)
    d = _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8)
    return (d.unsqueeze(2) * q).flatten(1)


def _iq4_values(codes: Tensor) -> Tensor:
    return _constant(IQ4_VALUES, torch.float32, codes.device)[codes.int()]


def _iq4_nl(b: Tensor) -> Tensor:
    return _half(b, 0) * _iq4_values(_nibbles(b[:, 2:]))


def _iq4_xs(b: Tensor) -> Tensor:
    low = _shifted(b[:, 4:8].unsqueeze(2), (0, 4), 15).flatten(1)
    high = _shifted(b[:, 2:4].unsqueeze(2), (0, 2, 4, 6), 3).flatten(1)
    d = _half(b, 0) * ((low | (high << 4)) - 32)
    q = _shifted(b[:, 8:].reshape(-1, 8, 16), (0, 4), 15).flatten(2)
    return (d.unsqueeze(2) * _iq4_values(q)).flatten(1)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
    "Q5_K": _q5_k,
    "Q4_K": _q4_k,
    "Q3_K": _q3_k,
    "Q2_K": _q2_k,
    "Q5_1": _q5_1,
    "Q5_0": _q5_0,
    "Q4_1": _q4_1,
    "Q4_0": _q4_0,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dequantize(blocks: Tensor, type: str, dtype: torch.dtype = torch.float32, planar: bool = False) -> Tensor:
    """Decode rows of blocks, as `decode.dequantize` describes."""
    shape = decoded_shape(blocks, type)
    if type in _PLAIN:
        return blocks.contiguous().view(_PLAIN[type]).to(dtype).view(shape)
    format = block_format(type)
    flat = (from_planes(blocks, type) if planar else blocks).reshape(-1, format.block_bytes)
    out = torch.empty(len(flat), format.block_size, dtype=dtype, device=blocks.device)
    step = _CHUNK_WEIGHTS // format.block_size
    for start in range(0, len(flat), step):
        out[start : start + step] = _DECODERS[type](flat[start : start + step])
    return out.view(shape)
