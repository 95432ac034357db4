"""Small pieces that the models share. Shapes: L tokens, D width, H heads."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis, in float32; the result has x's dtype."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Over the last axis, in float32; the result has x's dtype."""
    return F.layer_norm(x.float(), (x.shape[-1],), weight, bias, eps).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, then norm(x) * (1 + scale) + shift. x [L, D], shift and scale [D]."""
    return (F.layer_norm(x.float(), (x.shape[-1],), None, None, eps) * (1 + scale) + shift).to(x.dtype)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y in float32; the result has x's dtype. x, y [L, D], gate [D]."""
    return (x.float() + y.float() * gate).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v without a mask. q [L, D], k and v [M, D] -> [L, D]."""
    q, k, v = (t.unflatten(1, (heads, -1)).transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1).flatten(1)


def sinusoid(times: Tensor, width: int) -> Tensor:
    """float32 times [n] -> [n, width]: cosines of t * 10000^(-2i/width), then sines."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=times.device) / half)
    angle = torch.outer(times, frequency)
    return torch.cat((angle.cos(), angle.sin()), 1)


def rope_table(frames: int, rows: int, cols: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [frames * rows * cols, head_dim / 2] each, tokens in frame, row, column order.

    The head is split between the axes: d - 4 (d // 6) numbers turn with the frame, 2 (d // 6) with row and column
    each, at frequencies 10000^(-2j/width). Angles are computed in float64.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, (count, width) in enumerate(((frames, head_dim - 2 * side), (rows, side), (cols, side))):
        frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        shape = [1, 1, 1, -1]
        shape[axis] = count
        angle = torch.outer(torch.arange(count, dtype=torch.float64), frequency).view(shape)
        angles.append(angle.expand(frames, rows, cols, -1))
    table = torch.cat(angles, 3).flatten(0, 2)
    return table.cos().float().to(device), table.sin().float().to(device)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Turn neighbouring pairs of x [L, D] by the token's angles: (a, b) -> (a cos - b sin, a sin + b cos)."""
    cos, sin = (table.unsqueeze(1) for table in rope)
    a, b = x.float().view(len(x), heads, -1, 2).unbind(3)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), 3).flatten(1).to(x.dtype)
