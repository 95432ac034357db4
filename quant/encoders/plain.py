"""ggml's rounding without a search (quantize_row_q8_0_ref, _q4_0_ref and _q5_0_ref in ggml-quants.c), byte for byte.

The weight of largest magnitude gets the last code of the range, which determines the scale.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from skyrun.kernels import block_format

_TILE = 1 << 14  # blocks at a time, so that intermediate results stay in the cache
_BELOW_HALF = 0.5 - 2**-25  # the largest float32 below 1/2

# (blocks float32 [n, 32], buffer of their shape, blocks uint8 [n, block_bytes] to fill)
_Round = Callable[[Tensor, Tensor, Tensor], None]


def _encode(type: str, round: _Round, x: Tensor, importance: Tensor | None) -> Tensor:
    """float32 [n, 32] -> uint8 [n, block_bytes]. Importance is ignored: there is no search."""
    out = torch.empty(len(x), block_format(type).block_bytes, dtype=torch.uint8, device=x.device)
    scratch = torch.empty_like(x[:_TILE])
    for start in range(0, len(x), _TILE):
        some = x[start : start + _TILE]
        round(some, scratch[: len(some)], out[start : start + _TILE])
    return out


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, or 0 where scale is 0."""
    zero = (scale == 0).float()
    return (scale + zero).reciprocal_().sub_(zero)


def _store_half(out: Tensor, scale: Tensor) -> None:
    """Store scale [n, 1] as float16 in the first two bytes of each block."""
    out.view(torch.float16)[:, :1].copy_(scale)


def _q8_0(x: Tensor, scratch: Tensor, out: Tensor) -> None:
    scale = torch.abs(x, out=scratch).amax(1, keepdim=True).div_(127)
    _store_half(out, scale)
    inverse = _inverse(scale)
    # C's roundf rounds halves away from zero; the conversion to integers truncates.
    torch.mul(x, inverse, out=scratch)
    out[:, 2:].view(torch.int8).copy_(scratch.add_(torch.sign(scratch), alpha=_BELOW_HALF))


def _signed_peak(x: Tensor) -> Tensor:
    """The first value of largest magnitude in each row, [n, 1]."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    peak = high.lerp(low, (-low > high).float())
    (tied,) = ((high == -low) & (high > 0)).squeeze(1).nonzero(as_tuple=True)
    if len(tied):
        peak[tied] = x[tied].gather(1, x[tied].abs().argmax(1, keepdim=True))
    return peak


def _codes(x: Tensor, scratch: Tensor, out: Tensor, levels: int) -> Tensor:
    """Codes int8 [n, 32] from 0 to levels - 1. The scale is stored in the first bytes of `out`."""
    scale = _signed_peak(x).div_(-levels / 2)
    _store_half(out, scale)
    torch.mul(x, _inverse(scale), out=scratch).add_((levels + 1) / 2)
    return scratch.to(torch.int8).clamp_max_(levels - 1)


def _store_nibbles(out: Tensor, code: Tensor) -> None:
    """Store the first half of a block in the low nibbles and the second half in the high ones."""
    torch.add(code[:, :16], code[:, 16:], alpha=16, out=out.view(torch.int8))


def _q4_0(x: Tensor, scratch: Tensor, out: Tensor) -> None:
    _store_nibbles(out[:, 2:], _codes(x, scratch, out, 16))


def _q5_0(x: Tensor, scratch: Tensor, out: Tensor) -> None:
    code = _codes(x, scratch, out, 32)
    # Fifth bits, eight bytes at a time: the multiplication moves bit 4 of byte i to bit 56 + i.
    words = code.view(torch.int64)
    planes = ((words >> 4) & 0x0101010101010101) * 0x0102040810204080
    out[:, 2:6].copy_((planes >> 56) & 0xFF)
    _store_nibbles(out[:, 6:], code.bitwise_and_(15))


encode_q8_0 = partial(_encode, "Q8_0", _q8_0)
encode_q4_0_plain = partial(_encode, "Q4_0", _q4_0)
encode_q5_0_plain = partial(_encode, "Q5_0", _q5_0)
