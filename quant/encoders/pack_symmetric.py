"""Pack blocks of the types with value = scale * code in ggml's layouts (ggml-common.h, ggml-quants.c).

Every function takes codes [block_size, n] and sub-scales [groups, n], both uint8 from 0, and d float32 [n], and returns
blocks uint8 [block_bytes, n]. It overwrites the codes and sub-scales. Fields are split and joined along the first axis,
so that each operation runs over whole rows of blocks.
"""

import torch
from torch import Tensor

from skyrun.quant.encoders.tiles import Workspace


def _join(out: Tensor, fields: Tensor, bits: int) -> None:
    """out[i] = fields[0, i] + fields[1, i] * 2^bits + ...; fields: [k, rows, n], with values below 2^bits."""
    out.copy_(fields[0])
    for place, field in enumerate(fields[1:], 1):
        out.add_(field, alpha=1 << (place * bits))


def _store_half(out: Tensor, d: Tensor) -> None:
    """Store d [n] as float16 in the bytes of out [2, n]."""
    out.copy_(d.half().unsqueeze(1).view(torch.uint8).T)


def _low_bits(code: Tensor, bits: int, space: Workspace) -> Tensor:
    low = space("low bits", *code.shape, dtype=torch.uint8)
    return torch.bitwise_and(code, (1 << bits) - 1, out=low)


def pack_q4_0(code: Tensor, _: Tensor, d: Tensor, space: Workspace) -> Tensor:
    """d, then 16 bytes with the first half of the weights in the low nibbles and the second in the high ones."""
    out = space("blocks", 18, len(d), dtype=torch.uint8)
    _store_half(out[:2], d)
    _join(out[2:], code.view(2, 16, -1), 4)
    return out


def pack_q5_0(code: Tensor, _: Tensor, d: Tensor, space: Workspace) -> Tensor:
    """d, a plane of the fifth bits (weight i in bit i % 8 of byte i // 8), nibbles as in Q4_0."""
    out = space("blocks", 22, len(d), dtype=torch.uint8)
    _store_half(out[:2], d)
    _join(out[6:], _low_bits(code, 4, space).view(2, 16, -1), 4)
    _join(out[2:6], code.bitwise_right_shift_(4).view(4, 8, -1).transpose(0, 1), 1)
    return out


def pack_q3_k(code: Tensor, scale: Tensor, d: Tensor, space: Workspace) -> Tensor:
    """A plane of the third bits, 64 bytes of low bits, 12 bytes of 6-bit scales, d."""
    out = space("blocks", 110, len(d), dtype=torch.uint8)
    low = _low_bits(code, 2, space).view(2, 4, 32, -1)
    for half in range(2):
        _join(out[32 + 32 * half : 64 + 32 * half], low[half], 2)
    _join(out[:32], code.bitwise_right_shift_(2).view(8, 32, -1), 1)
    _join(out[96:104], _low_bits(scale, 4, space).view(2, 8, -1), 4)
    _join(out[104:108], scale.bitwise_right_shift_(4).view(4, 4, -1), 2)
    _store_half(out[108:], d)
    return out


def pack_q6_k(code: Tensor, scale: Tensor, d: Tensor, space: Workspace) -> Tensor:
    """128 bytes of low nibbles, 64 bytes of high bits, 16 signed scales (the exclusive or subtracts 128), d."""
    out = space("blocks", 210, len(d), dtype=torch.uint8)
    low = _low_bits(code, 4, space).view(2, 2, 64, -1)
    high = code.bitwise_right_shift_(4).view(2, 4, 32, -1)
    for half in range(2):
        _join(out[64 * half : 64 * half + 64], low[half], 4)
        _join(out[128 + 32 * half : 160 + 32 * half], high[half], 2)
    torch.bitwise_xor(scale, 128, out=out[192:208])
    _store_half(out[208:], d)
    return out


def pack_iq4_xs(code: Tensor, scale: Tensor, d: Tensor, space: Workspace) -> Tensor:
    """d, 16 bits of the scales' high bits, 4 bytes of their low nibbles, nibbles of each group of 32 as in Q4_0."""
    out = space("blocks", 136, len(d), dtype=torch.uint8)
    _store_half(out[:2], d)
    _join(out[4:8], _low_bits(scale, 4, space).view(4, 2, -1).transpose(0, 1), 4)
    _join(out[2:4], scale.bitwise_right_shift_(4).view(2, 4, -1).transpose(0, 1), 2)
    _join(out[8:].view(8, 16, -1), code.view(8, 2, 16, -1).transpose(0, 1), 4)
    return out
