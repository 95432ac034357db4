"""Narrow numbers and notice those that are none, in plain torch."""

import torch
from torch import Tensor


def cast_checked(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float16 y in another type, and bool []: whether all of y is finite."""
    return y.to(dtype), y.isfinite().all()
