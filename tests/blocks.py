"""Blocks of random bytes that decode to moderate numbers, for tests of kernels."""

import torch
from torch import Tensor

from skyrun.kernels import FORMATS
from skyrun.kernels.planes import FIELDS

BLOCK_TYPES = [name for name, format in FORMATS.items() if format.block_size > 1]
_HALVES = {"d": 1, "dm": 2}  # fields that are float16


def random_blocks(type: str, rows: int, cols: int, seed: int = 0, scale: float = 0.01) -> Tensor:
    """uint8 [rows, row_bytes]: every bit random, but for scales between 0 and `scale`, which are float16."""
    generator = torch.Generator().manual_seed(seed)
    format = FORMATS[type]
    data = torch.randint(0, 256, (rows, format.row_bytes(cols)), dtype=torch.uint8, generator=generator)
    blocks = data.view(-1, format.block_bytes)
    starts = [(field.block_start, _HALVES[field.name]) for field in FIELDS.get(type, ()) if field.name in _HALVES]
    for start, count in (starts or [(0, 2)]) if rows else ():  # Q4_K and Q5_K begin with theirs
        halves = scale * torch.rand(len(blocks), count, generator=generator)
        blocks[:, start : start + 2 * count] = halves.half().view(torch.uint8)
    return data
