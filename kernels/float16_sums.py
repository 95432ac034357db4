"""Products that add up in float16: twice as quick on GeForce cards, but numbers end at 65504.

A number that leaves the range becomes infinite or NaN and stays so. Whether one did is known to the device; the host
would have to wait for it after every product. So the device keeps a flag for each, and they are looked at together.
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
_Flags = list[tuple[str, Tensor]]  # whose product it was, and bool []: whether all of it is finite

_gathered: ContextVar[_Flags | None] = ContextVar("gathered", default=None)
_overflowed: set[str] = set()  # names of weights; in the next step they would leave the range again


def may_overflow(weight: QuantizedWeight) -> bool:
    """Whether a product with this weight has left float16's range before."""
    return weight.name in _overflowed


def multiply(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x [L, cols] times weight transposed -> [L, rows] in x's dtype, which counts only inside of `within_range`."""
    with float16_accumulation():
        bias16 = None if bias is None else bias.to(torch.float16)
        product = F.linear(x.to(torch.float16), weight.dense(torch.float16), bias16)
    if uses_triton(x.device):
        from skyrun.kernels.triton_cast import cast_checked
    else:
        from skyrun.kernels.torch_cast import cast_checked
    result, finite = cast_checked(product, x.dtype)
    flags = _gathered.get()
    assert flags is not None, "nobody would look at the flag"
    flags.append((weight.name, finite))
    return result


def within_range(compute: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What `compute` gives when no product in it leaves float16's range; it may be called several times.

    The first weight whose product does is remembered: it is not multiplied so again. What came after it followed from
    it, so everything is computed anew. Inside of another `within_range`, that one looks at the flags of both.
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
        finite = torch.stack([flag for _, flag in flags]).tolist()  # the one time that the host waits
        if all(finite):
            return result
        _overflowed.add(flags[finite.index(False)][0])
        del result
