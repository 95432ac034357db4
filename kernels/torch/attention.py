"""Quick attention in plain torch: scores in int8, with one scale per token and head, keys minus their mean.

With "int8" only the scores lose precision (SageAttention, arXiv:2410.02367): probabilities and values are in float16.
With "full-int8" and "fp8" they have 8 bits. A probability is rounded relative to the largest one of its 64 keys, which
takes the largest code, and a value relative to the largest one of its channel: int8 with one scale for all keys would
add several times the error.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from skyrun.kernels.quantized_keys import BLOCK, HEAD_DIM, LARGEST, QuantizedKeys
from skyrun.kernels.tiles import Selection

_LEVELS = 127
_LARGEST_VALUE = 512.0  # 64 of these, weighted by probabilities, add up without overflowing float16
_SMALLEST = 1e-30  # a channel of smaller values is as good as zero; scales for them would leave float32
_CHUNK = 1 << 24  # scores that are computed at a time


def quantize_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [M, H * 128] -> codes int8 [M, H * 128], scales float32 [H, M]."""
    mean = k.mean(0, dtype=torch.float32)
    return _quantize(k.float() - mean, 1.0)


def quantize_values(v: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values [M, H * 128] -> values, scales and sums of blocks, as `QuantizedKeys` has them."""
    if precision == "int8":
        scales = value_scales(v)
        return (_heads(v).float() / scales.unsqueeze(1)).half().flatten(1), scales, None
    scales = channel_scales(v, precision)
    codes = pad(v.float() * (1 / scales), (0, 0, 0, -len(v) % BLOCK)).T.contiguous()
    if precision == "fp8":
        return codes.to(torch.float8_e4m3fn), scales, None
    sums = 128 * codes.round().unflatten(1, (-1, BLOCK)).sum(2).int()
    return codes.round().to(torch.int8), scales, sums.T.contiguous()


def value_scales(v: Tensor) -> Tensor:
    """Per head the power of two that scales its values to at most 512, or 1 if they are smaller; float32 [H]."""
    largest = _heads(v).abs().amax((0, 2)).float()
    powers: Tensor = torch.log2(largest.clamp_min(_LARGEST_VALUE) / _LARGEST_VALUE).ceil()
    return torch.exp2(powers)


def channel_scales(v: Tensor, precision: str) -> Tensor:
    """Per channel what a code of 1 stands for, so that its largest value has the largest code; float32 [H * 128]."""
    largest = torch.maximum(v.amax(0), -v.amin(0)).float()
    return largest.clamp_min(_SMALLEST) / LARGEST[precision][1]


def attend(q: Tensor, keys: QuantizedKeys, chosen: Selection | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """softmax(q k^T / sqrt(128)) v. q [L, H * 128] -> [L, H * 128] in q's dtype.

    chosen: the keys that queries read; None stands for all. dtype: of the result, in place of q's.
    """
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    heads = len(keys.scales)
    rows = max(1, _CHUNK // max(1, heads * len(keys.codes)))
    k, v = _heads(keys.codes).transpose(0, 1).float(), _values(keys)
    for start in range(0, len(q), rows):
        codes, scales = _quantize(q[start : start + rows].float(), 1 / math.sqrt(HEAD_DIM))
        scores = _heads(codes).transpose(0, 1).float() @ k.mT
        scores *= scales.unsqueeze(2) * keys.scales.unsqueeze(1)
        if chosen is not None:
            scores.masked_fill_(~read_keys(chosen, range(start, min(start + rows, len(q)))), -math.inf)
        weights = scores.softmax(2) if keys.precision == "int8" else _in_8_bits(scores, keys.precision)
        out[start : start + rows] = (weights @ v).transpose(0, 1).flatten(1)
    return out


def attend_plain(q: Tensor, k: Tensor, v: Tensor, chosen: Selection, dtype: torch.dtype | None = None) -> Tensor:
    """As `attend`, with keys and values [M, H * 128] as they are."""
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    rows = max(1, _CHUNK // max(1, len(chosen.counts) * len(k)))
    keys, values = (_heads(t).transpose(0, 1).float() for t in (k, v))
    for start in range(0, len(q), rows):
        some = range(start, min(start + rows, len(q)))
        scores = _heads(q[start : some.stop]).transpose(0, 1).float() @ keys.mT / math.sqrt(HEAD_DIM)
        weights = scores.masked_fill_(~read_keys(chosen, some), -math.inf).softmax(2)
        out[start : some.stop] = (weights @ values).transpose(0, 1).flatten(1)
    return out


def read_keys(chosen: Selection, rows: range) -> Tensor:
    """Whether queries read keys, bool [H, rows, M]."""
    heads, queries, width = chosen.lists.shape
    device, tiles = chosen.lists.device, chosen.tiles
    count = tiles.count_keys(chosen.keys)
    listed = torch.arange(width, device=device) < chosen.counts.unsqueeze(2)
    lists = torch.where(listed, chosen.lists.long(), count)
    read = torch.zeros(heads, queries, count + 1, dtype=torch.bool, device=device).scatter_(2, lists, True)
    read[:, :, chosen.keys // tiles.keys :] = True  # keys after the last whole tile
    query = torch.arange(rows.start, rows.stop, device=device) // tiles.queries
    return read[:, query][:, :, torch.arange(chosen.keys, device=device) // tiles.keys]


def _values(keys: QuantizedKeys) -> Tensor:
    """What the values of the keys stand for, float32 [H, M, 128]."""
    if keys.precision == "int8":
        return _heads(keys.values).transpose(0, 1).float() * keys.value_scales.view(-1, 1, 1)
    channels = keys.values[:, : len(keys.codes)].float() * keys.value_scales.unsqueeze(1)
    return _heads(channels.T).transpose(0, 1)


def _in_8_bits(scores: Tensor, precision: str) -> Tensor:
    """softmax(scores), its numerators rounded to 8 bits in blocks of keys; scores [H, L, M]."""
    largest = LARGEST[precision][0]
    blocks = pad(scores, (0, -scores.shape[2] % BLOCK), value=-math.inf).unflatten(2, (-1, BLOCK))
    peaks = blocks.amax(3, keepdim=True).clamp_min(torch.finfo(torch.float32).min)  # of blocks that are not read
    shares = (peaks - peaks.amax(2, keepdim=True)).exp() / largest
    weights = (blocks - peaks).exp() * largest
    total = (weights * shares).sum((2, 3)).unsqueeze(2)
    codes = weights.to(torch.float8_e4m3fn).float() if precision == "fp8" else weights.round()
    rounded: Tensor = (codes * shares).flatten(2)[:, :, : scores.shape[2]] / total
    return rounded


def _heads(t: Tensor) -> Tensor:
    """[L, H * 128] -> [L, H, 128]."""
    heads: Tensor = t.unflatten(1, (-1, HEAD_DIM))
    return heads


def _quantize(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """float32 [L, H * 128] -> codes int8 [L, H * 128], and scales [H, L] multiplied by `factor`."""
    heads = _heads(x)
    scales = heads.abs().amax(2, keepdim=True) / _LEVELS
    codes = (heads / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return codes.flatten(1), scales.squeeze(2).T.contiguous() * factor
