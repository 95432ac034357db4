"""Cast to another dtype and check that all values are finite, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 4
_LARGEST: tl.constexpr = tl.constexpr(65504.0)


@triton.jit
def cast_kernel(source, target, broken, count, BLOCK: tl.constexpr):
    """Cast source, float16, to target's dtype. broken becomes 1 if a value is infinite or NaN."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    y = tl.load(source + offsets, mask=inside, other=0.0)
    tl.store(target + offsets, y.to(target.dtype.element_ty), mask=inside)
    finite = tl.abs(y.to(tl.float32)) <= _LARGEST  # false for NaN
    if tl.min(finite.to(tl.int32), 0) == 0:
        tl.store(broken, 1)


def cast_checked(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `torch_cast.cast_checked`."""
    y = y.contiguous()
    target = torch.empty_like(y, dtype=dtype)
    broken = torch.zeros((), dtype=torch.int32, device=y.device)
    if y.numel():
        cast_kernel[(triton.cdiv(y.numel(), BLOCK),)](y, target, broken, y.numel(), BLOCK, num_warps=WARPS)
    return target, broken == 0
