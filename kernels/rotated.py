"""Rows in rotated int8, which the fast path multiplies."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 256  # neighbouring values of a row that are rotated together


@dataclass(frozen=True)
class RotatedInt8:
    """Rows that were rotated and quantized to int8; rotating `codes * scales` again gives the rows.

    codes: int8 [..., cols]. scales: float32 [...]. dtype: of the original rows and of matmul results.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


def check_width(cols: int) -> None:
    """Raise ValueError unless `cols` is a multiple of GROUP."""
    if cols % GROUP:
        raise ValueError(f"rows of {cols} are not whole groups of {GROUP}")
