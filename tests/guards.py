"""Outputs of kernels in the middle of larger tensors, so that what is written beside them is seen."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

_BESIDE = 256  # elements on each side; keeps the middle aligned
_SENTINEL = 77  # holds in every dtype, and is no result by chance


@contextmanager
def guarded() -> Iterator[None]:
    """While inside, torch.empty(shape, dtype=, device=) is full of a sentinel, and what lies around it must stay so."""
    made: list[Tensor] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        whole = torch.full((math.prod(shape) + 2 * _BESIDE,), _SENTINEL, dtype=dtype, device=device)
        made.append(whole)
        return whole[_BESIDE : len(whole) - _BESIDE].view(shape)

    with patch("torch.empty", empty):
        yield
    assert made, "nothing was guarded"
    for whole in made:
        assert (whole[:_BESIDE] == _SENTINEL).all() and (whole[-_BESIDE:] == _SENTINEL).all(), "written beside a result"
