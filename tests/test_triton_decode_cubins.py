"""What the compiler makes of decoding: wide memory accesses, no spills, and few instructions for each number."""

from pathlib import Path

import pytest
from blocks import BLOCK_TYPES
from cubins import ARCHS, Cubins, Variant, arch_param, cases, sources

import skyrun.kernels
from skyrun.kernels.triton import decode as triton_decode

# Instructions per number, to bfloat16. An H200 copies at full speed up to about 18.
BUDGET = {
    **{"Q8_0": 7.5, "Q6_K": 12, "Q5_K": 12, "Q4_K": 9, "Q3_K": 13, "Q2_K": 8.5},
    **{"Q5_1": 9.5, "Q5_0": 10.5, "Q4_1": 8, "Q4_0": 8, "IQ4_NL": 13, "IQ4_XS": 14.5},
}
OTHER_DTYPES = {"fp16": 90, "fp32": 89}  # each on one architecture


def variant(type, dtype, archs=ARCHS):
    return Variant(
        f"{type} {dtype}",
        "skyrun.kernels.triton.decode:decode_kernel",
        {"data": "*u8", "out": f"*{dtype}", "n": "i32"},
        triton_decode.constants(type),
        warps=triton_decode.WARPS,
        unaligned=("n",),
        archs=archs,
    )


VARIANTS = [
    *(variant(type, "bf16") for type in BLOCK_TYPES),
    *(variant(type, dtype, (arch,)) for dtype, arch in OTHER_DTYPES.items() for type in ("Q8_0", "Q4_K", "Q6_K")),
]


@pytest.fixture(scope="module")
def cubins():
    return Cubins(VARIANTS)


@pytest.mark.parametrize(("name", "arch"), cases(VARIANTS))
def test_nothing_spills_and_stores_are_wide(cubins, name, arch):
    cubin = cubins[name, arch]
    assert cubin.stack == 0
    assert cubin.registers <= 64  # eight programs fit on a multiprocessor
    assert cubin.count("STG") == cubin.count("STG.E.128") > 0


@pytest.mark.parametrize("arch", [arch_param(arch) for arch in ARCHS])
@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_instructions_per_number(cubins, type, arch):
    cubin = cubins[f"{type} bf16", arch]
    assert cubin.per_element(triton_decode.TILE) <= BUDGET[type]
    assert cubin.count("LDG.E.128") + cubin.count("LDG.E.64") > 0  # codes; scales take narrow loads
    assert cubin.count("LDG") <= 7


def test_a_changed_kernel_is_compiled_anew():
    kernels = Path(skyrun.kernels.__file__).parent
    assert {path for path in kernels.rglob("*.py") if "@triton.jit" in path.read_text()} <= {*sources()}
