"""Waves of time and place that the models share."""

import math

import torch
from torch import Tensor


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
