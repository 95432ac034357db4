"""Matmuls that accumulate in float16: twice as fast on GeForce cards, but values beyond 65504 overflow.

A value that overflows becomes infinite or NaN, and so does what is computed from it: no norm, softmax or gate makes it
finite again. So only what a computation ends with is looked at. If that is not finite, it is computed anew without
float16, then and whenever it comes again.
"""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.machine.device import float16_accumulation, float16_sums_are_quick
from skyrun.kernels.weight import QuantizedWeight

R = TypeVar("R")


@dataclass
class _Attempt:
    """A computation under way: whether it may use float16, and whether it does."""

    allowed: bool
    used: bool = False


_attempt: ContextVar[_Attempt | None] = ContextVar("attempt", default=None)
_overflowed: set[str] = set()  # names of computations that would overflow again in the next step


def are_used(device: torch.device) -> bool:
    """Whether what runs `within_range` now sums products in float16 on the device."""
    attempt = _attempt.get()
    return attempt is not None and attempt.allowed and float16_sums_are_quick(device)


def handed_on(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of what layers hand to each other for tokens of a dtype: float16 if it is as short and they sum in it.

    The caller will have products in it: their results are looked at.
    """
    if dtype != torch.bfloat16 or not are_used(device):
        return dtype
    _use()
    return torch.float16


def multiply(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x [L, cols] @ weight^T -> [L, rows] in x's dtype. The result may have overflowed: call it in `within_range`."""
    _use()
    with float16_accumulation():
        bias16 = None if bias is None else bias.to(torch.float16)
        y = F.linear(x.to(torch.float16), weight.dense(torch.float16), bias16)
    return y.to(x.dtype)


def within_range(name: str, compute: Callable[[], R], tensors: Callable[[R], Iterable[Tensor]]) -> R:
    """What `compute` returns, computed without float16 if it would overflow.

    A nested call leaves the check to the outer one. The host waits for the device once, if float16 was used.

    Args:
        name: of what is computed, by which it is known in later steps.
        compute: runs again after an overflow, so it must leave its inputs as they are.
        tensors: those of a result that are not finite if anything has overflowed.
    """
    if _attempt.get() is not None:
        return compute()
    if name not in _overflowed:
        attempt = _Attempt(True)
        result = _run(attempt, compute)
        if not attempt.used or are_finite(tensors(result)):
            return result
        del result
    result = _run(_Attempt(False), compute)
    if name not in _overflowed and are_finite(tensors(result)):  # otherwise it was broken before
        _overflowed.add(name)
    return result


def _use() -> None:
    attempt = _attempt.get()
    assert attempt is not None, "outside of within_range nobody looks at what has overflowed"
    attempt.used = True


def _run(attempt: _Attempt, compute: Callable[[], R]) -> R:
    token = _attempt.set(attempt)
    try:
        return compute()
    finally:
        _attempt.reset(token)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values are finite, in one pass without another tensor of their size."""
    ends = [torch.stack(torch.aminmax(tensor)).isfinite().all() for tensor in tensors if tensor.numel()]
    return all(torch.stack(ends).tolist()) if ends else True
