"""Waves of time and place that the models share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def sinusoid(times: Tensor, width: int) -> Tensor:
    """times [n] -> float32 [n, width]: cosines of t * 10000^(-2i/width), then sines. Angles are computed in float64."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64, device=times.device) / half)
    angle = torch.outer(times.double(), frequency)
    return torch.cat((angle.cos(), angle.sin()), 1).float()


def rope_table(
    frames: Sequence[int], rows: int, cols: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [len(frames) * rows * cols, head_dim / 2] each, tokens in frame, row, column order.

    frames: where they are on the time axis.

    The head is split between the axes: d - 4 (d // 6) numbers turn with the frame, 2 (d // 6) with row and column
    each, at frequencies 10000^(-2j/width). Angles are computed in float64.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, (places, width) in enumerate(((frames, head_dim - 2 * side), (range(rows), side), (range(cols), side))):
        frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        shape = [1, 1, 1, -1]
        shape[axis] = len(places)
        angle = torch.outer(torch.tensor(list(places), dtype=torch.float64), frequency).view(shape)
        angles.append(angle.expand(len(frames), rows, cols, -1))
    table = torch.cat(angles, 3).flatten(0, 2)
    return table.cos().float().to(device), table.sin().float().to(device)
