"""Cast to another dtype and check that all values are finite, in plain torch."""

import torch
from torch import Tensor


def cast_checked(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float16 y in another dtype, and bool []: whether all of y is finite."""
    return y.to(dtype), y.isfinite().all()
