"""Pack blocks of the affine types in the layout of ggml-common.h.

Packers fill uint8 [..., block_bytes, n]: the bytes of a block lie along the second to last axis, blocks along the last.
Codes are floats with integer values. Fields that share a byte are added as floats, which is exact; only the result is
converted to bytes, by way of int32, because torch converts integers to bytes much faster than floats.
"""

import torch
from torch import Tensor


def _put(out: Tensor, byte: Tensor) -> None:
    out.copy_(byte.int().view(out.shape))


def _nibbles(low: Tensor, high: Tensor) -> Tensor:
    return torch.add(low, high, alpha=16)


def _eight_bits(bit: Tensor) -> Tensor:
    """Zeros and ones [..., 8, k, n] -> bytes [..., k, n], with the first bit lowest."""
    for shift in (1, 2, 4):
        bit = torch.add(bit[..., 0::2, :, :], bit[..., 1::2, :, :], alpha=2**shift)
    return bit.squeeze(-3)


def _split(code: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Split codes at a power of two -> (code % at, code // at)."""
    high = (code * (1 / at)).floor_()
    return torch.sub(code, high, alpha=at), high


def put_halves(out: Tensor, first: Tensor, second: Tensor) -> None:
    """Two float16 values per block, [..., n] each -> bytes [..., 4, n]."""
    pair = torch.stack((first, second), -1).half().view(torch.uint8)
    out.copy_(pair.transpose(-1, -2))


def put_scales_4(out: Tensor, scale: Tensor, minimum: Tensor) -> None:
    """Q2_K: scales and mins of 4 bits [..., 16, n]."""
    _put(out, _nibbles(scale, minimum))


def put_scales_6(out: Tensor, scale: Tensor, minimum: Tensor) -> None:
    """Q4_K, Q5_K: scales and mins of 6 bits [..., 8, n]. The first four also store the top bits of the last four."""
    scale_low, scale_high = _split(scale[..., 4:, :], 16)
    minimum_low, minimum_high = _split(minimum[..., 4:, :], 16)
    _put(out[..., :4, :], torch.add(scale[..., :4, :], scale_high, alpha=64))
    _put(out[..., 4:8, :], torch.add(minimum[..., :4, :], minimum_high, alpha=64))
    _put(out[..., 8:, :], _nibbles(scale_low, minimum_low))


def put_codes_2(out: Tensor, code: Tensor) -> None:
    """Q2_K: codes [16, 16, n] of 2 bits; a byte holds one code of each of four runs of 32."""
    runs = code.view(2, 4, 32, -1)
    pairs = torch.add(runs[:, 0::2], runs[:, 1::2], alpha=4)
    _put(out, _nibbles(pairs[:, 0], pairs[:, 1]))


def put_codes_4(out: Tensor, code: Tensor) -> None:
    """Q4_K: codes [8, 32, n] of 4 bits."""
    _put(out, _nibbles(code[0::2], code[1::2]))


def put_codes_5(out: Tensor, code: Tensor) -> None:
    """Q5_K: codes [8, 32, n] of 5 bits; the highest bits of all groups come first."""
    low, high = _split(code, 16)
    _put(out[:32], _eight_bits(high))
    put_codes_4(out[32:], low)


def put_legacy_codes_4(out: Tensor, code: Tensor) -> None:
    """Q4_1: codes [32, n] of 4 bits."""
    _put(out, _nibbles(code[:16], code[16:]))


def put_legacy_codes_5(out: Tensor, code: Tensor) -> None:
    """Q5_1: codes [32, n] of 5 bits; the highest bits come first."""
    low, high = _split(code, 16)
    _put(out[:4], _eight_bits(high.view(4, 8, -1).transpose(0, 1)))
    put_legacy_codes_4(out[4:], low)
