"""Attention with int8 scores in plain torch: one scale per token and head, keys minus their mean, values in float16.

Only the scores lose precision. Probabilities and values stay in float16: int8 there would add several times the error
(SageAttention, arXiv:2410.02367).
"""

import math

import torch
from torch import Tensor

from skyrun.kernels.quantized_keys import HEAD_DIM, QuantizedKeys

_LEVELS = 127
_LARGEST_VALUE = 512.0  # 64 of these, weighted by probabilities, add up without overflowing float16
_CHUNK = 1 << 24  # scores that are computed at a time


def quantize_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [M, H * 128] -> codes int8 [M, H * 128], scales float32 [H, M]."""
    mean = k.mean(0, dtype=torch.float32)
    return _quantize(k.float() - mean, 1.0)


def quantize_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """Values [M, H * 128] -> float16 of that shape, and per head the power of two to multiply them with, [H]."""
    scales = value_scales(v)
    return (_heads(v).float() / scales.unsqueeze(1)).half().flatten(1), scales


def value_scales(v: Tensor) -> Tensor:
    """Per head the power of two that scales its values to at most 512, or 1 if they are smaller; float32 [H]."""
    largest = _heads(v).abs().amax((0, 2)).float()
    powers: Tensor = torch.log2(largest.clamp_min(_LARGEST_VALUE) / _LARGEST_VALUE).ceil()
    return torch.exp2(powers)


def attend(q: Tensor, keys: QuantizedKeys) -> Tensor:
    """softmax(q k^T / sqrt(128)) v. q [L, H * 128] -> [L, H * 128] in q's dtype."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    heads = len(keys.scales)
    rows = max(1, _CHUNK // max(1, heads * len(keys.codes)))
    k, v = _heads(keys.codes).transpose(0, 1).float(), _heads(keys.values).transpose(0, 1).float()
    for start in range(0, len(q), rows):
        codes, scales = _quantize(q[start : start + rows].float(), 1 / math.sqrt(HEAD_DIM))
        scores = _heads(codes).transpose(0, 1).float() @ k.mT
        scores *= scales.unsqueeze(2) * keys.scales.unsqueeze(1)
        mixed = scores.softmax(2) @ v * keys.value_scales.view(-1, 1, 1)
        out[start : start + rows] = mixed.transpose(0, 1).flatten(1)
    return out


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
