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

from skyrun.kernels.quantized_keys import BLOCK, HEAD_DIM, LARGEST, QuantizedKeys, empty_values, largest_values
from skyrun.kernels.tiles import Selection

_LEVELS = 127
_CHUNK = 1 << 24  # scores that are computed at a time


def quantize_keys(k: Tensor, mean: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keys [M, H * 128] -> codes int8 [M, H * 128], scales float32 [H, M].

    mean: of all keys, float32 [H * 128]; None if these are all. out: memory for the codes, apart from the keys.
    """
    codes, scales = _quantize(k.float() - (k.mean(0, dtype=torch.float32) if mean is None else mean), 1.0)
    return (codes if out is None else out.copy_(codes)), scales


def quantize_values(v: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values [M, H * 128] -> values, scales and sums of blocks, as `QuantizedKeys` has them."""
    values, scales, sums = empty_values(largest_values(v), len(v), precision)
    write_values(v, 0, values, scales, sums)
    return values, scales, sums


def write_values(v: Tensor, first: int, values: Tensor, scales: Tensor, sums: Tensor | None) -> None:
    """Quantize the values [n, H * 128] of the keys from `first` on, into what `empty_values` returns.

    In 8 bits they are whole blocks, but for the last ones.
    """
    if values.dtype == torch.float16:
        values[first : first + len(v)] = (_heads(v).float() / scales.unsqueeze(1)).half().flatten(1)
        return
    codes = pad(v.float() * (1 / scales), (0, 0, 0, -len(v) % BLOCK)).T.contiguous()
    codes = codes if sums is None else codes.round()
    values[:, first : first + codes.shape[1]] = codes.to(values.dtype)
    if sums is not None:
        blocks = 128 * codes.unflatten(1, (-1, BLOCK)).sum(2).int()
        sums[first // BLOCK : first // BLOCK + blocks.shape[1]] = blocks.T


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
