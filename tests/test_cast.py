"""Narrowing with a check: what float16 sums are guarded by."""

import inspect
import math

import pytest
import torch
from cubins import Variant, compile_all

from skyrun.kernels import torch_cast, triton_cast

VARIANT = Variant(
    "cast",
    "skyrun.kernels.triton_cast:cast_kernel",
    {"source": "*fp16", "target": "*bf16", "broken": "*i32", "count": "i32"},
    {"BLOCK": triton_cast.BLOCK},
    warps=triton_cast.WARPS,
)


def test_twins_have_one_signature():
    assert inspect.signature(torch_cast.cast_checked) == inspect.signature(triton_cast.cast_checked)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 4099), (0, 5)])
@pytest.mark.parametrize("bad", [None, math.inf, -math.inf, math.nan])
def test_casting(shape, bad):
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    if bad is not None and y.numel():
        y.view(-1)[-1] = bad
    for module in (torch_cast, triton_cast):
        result, finite = module.cast_checked(y, torch.float32)
        assert torch.equal(result, y.float()) or bad is not None
        assert bool(finite) == (bad is None or not y.numel())


def test_the_largest_float16_is_finite():
    assert triton_cast.cast_checked(torch.full((9,), 65504.0).half(), torch.float16)[1]


def test_cubins():
    for cubin in compile_all([(VARIANT, arch) for arch in VARIANT.archs]).values():
        assert cubin.stack == 0
        assert cubin.count("LDG.E.128") and cubin.count("STG.E.128")
        assert cubin.per_element(triton_cast.BLOCK) < 7.5
