"""Rows in rotated int8: what the fast path multiplies."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 256  # neighbouring numbers of a row that are rotated together


@dataclass(frozen=True)
class RotatedInt8:
    """Rows that stand for `codes * scales`, turned back: codes int8 [..., cols], scales float32 [...].

    dtype: of the numbers before, and of what a multiplication gives.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


def check_width(cols: int) -> None:
    """ValueError unless rows of `cols` are whole groups."""
    if cols % GROUP:
        raise ValueError(f"rows of {cols} are not whole groups of {GROUP}")
