"""Matmuls that accumulate in float16: twice as fast on GeForce cards, but values beyond 65504 overflow.

A value that overflows becomes infinite or NaN and stays so. Checking after every matmul would make the host wait for
the device each time, so the device keeps a flag for each matmul and the host reads all flags together.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.device import float16_accumulation, uses_triton
from skyrun.kernels.weight import QuantizedWeight

P = ParamSpec("P")
R = TypeVar("R")
_Flags = list[tuple[str, Tensor]]  # name of the weight, and bool []: whether the whole result is finite

_gathered: ContextVar[_Flags | None] = ContextVar("gathered", default=None)
_overflowed: set[str] = set()  # names of weights whose matmul would overflow again in the next step


def may_overflow(weight: QuantizedWeight) -> bool:
    """Whether a matmul with this weight has overflowed float16 before."""
    return weight.name in _overflowed


def multiply(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x [L, cols] @ weight^T -> [L, rows] in x's dtype. The result may have overflowed: call it in `within_range`."""
    with float16_accumulation():
        bias16 = None if bias is None else bias.to(torch.float16)
        y = F.linear(x.to(torch.float16), weight.dense(torch.float16), bias16)
    if uses_triton(x.device):
        from skyrun.kernels.triton_cast import cast_checked
    else:
        from skyrun.kernels.torch_cast import cast_checked
    result, finite = cast_checked(y, x.dtype)
    flags = _gathered.get()
    assert flags is not None, "outside of within_range nobody reads the flag"
    flags.append((weight.name, finite))
    return result


def within_range(compute: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `compute` until no matmul in it overflows float16, and return its result.

    After an overflow, the first weight that caused it is remembered and not multiplied in float16 again. Everything
    after it depends on the bad values, so `compute` runs anew. A nested call leaves the check to the outer one.
    """
    if _gathered.get() is not None:
        return compute(*args, **kwargs)
    while True:
        flags: _Flags = []
        token = _gathered.set(flags)
        try:
            result = compute(*args, **kwargs)
        finally:
            _gathered.reset(token)
        if not flags:
            return result
        finite = torch.stack([flag for _, flag in flags]).tolist()  # the host waits for the device here only
        if all(finite):
            return result
        _overflowed.add(flags[finite.index(False)][0])
        del result
