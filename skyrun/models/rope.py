"""Sinusoidal time embeddings and rotary position tables."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def sinusoid(times: Tensor, width: int) -> Tensor:
    """times [n] -> float32 [n, width]: cosines of t * 10000^(-2i/width), then sines.

    These are the sinusoids of Vaswani et al. 2017 (arXiv:1706.03762). Angles are computed in float64.
    """
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64, device=times.device) / half)
    angle = torch.outer(times.double(), frequency)
    return torch.cat((angle.cos(), angle.sin()), 1).float()


def rope_table(
    frames: Sequence[int], rows: int, cols: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE on three axes, float32 [len(frames) * rows * cols, head_dim / 2] each.

    RoPE (Su et al. 2021, arXiv:2104.09864) with the head split between the axes as in Wan: of its d = head_dim values,
    d - 4 (d // 6) are rotated by the frame and 2 (d // 6) each by the row and the column, at frequencies
    10000^(-2j/width). Tokens are in frame, row, column order. Angles are computed in float64.

    Args:
        frames: positions of the frames on the time axis.
        rows: how many rows of tokens a frame has.
        cols: how many columns of tokens a frame has.
        head_dim: of the attention.
        device: where the table is stored.
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
