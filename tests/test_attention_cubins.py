"""What the compiler makes of the attention kernels, for every architecture: no spills, and the right tensor cores."""

import pytest
from cubins import ARCHS, SHARED_LIMIT, Cubins, Variant, cases

from skyrun.kernels.triton import attention as triton_attention

VALUES = {"int8": "*fp16", "full-int8": "*i8", "fp8": "*fp8e4nv"}
TENSORS = {"q": "*i8", "q_scales": "*fp32", "k": "*i8", "k_scales": "*fp32", "v_scales": "*fp32"}
SIZES = {"out": "*bf16", "L": "i32", "M": "i32", "stride": "i32", "width": "i32", "factor": "fp32"}
LISTS = {"lists": "*i16", "counts": "*i32", "heads": "*i32"}
TILE = {"HEADS": 40, "QUERIES": triton_attention.QUERIES, "KEYS": triton_attention.KEYS}
ROWS = {"HEADS": 40, "ROWS": triton_attention.ROWS}
MODULE = "skyrun.kernels.triton.attention"
GEFORCE = (86, 89, 120)
FLOAT8 = tuple(arch for arch in ARCHS if arch >= 89)


def attend_variant(precision, archs=ARCHS, float16_sums=False, listed=False):
    """Of queries with a list of keys, or without. "exact" has lists alone; others are torch's."""
    signature = TENSORS | SIZES | {"v": VALUES.get(precision, "*bf16")}
    signature |= {"sums": "*i32"} if precision == "full-int8" else {}
    signature |= LISTS if listed else {}
    if precision == "exact":
        plain = dict.fromkeys(("q", "k"), "*bf16")
        signature = {name: kind for name, kind in (signature | plain).items() if "scales" not in name}
    pointers = (*TENSORS, "v", "sums", *LISTS)
    return Variant(
        f"attend, {precision}" + ", float16 sums" * float16_sums + ", lists" * listed,
        f"{MODULE}:attend_kernel",
        signature | {"out": "*fp16" if float16_sums else "*bf16"},
        TILE
        | {"FLOAT16_SUMS": float16_sums, "LARGEST": triton_attention.LARGEST_WEIGHT.get(precision)}
        | {name: None for name in pointers if name not in signature},
        warps=triton_attention.WARPS,
        stages=triton_attention.STAGES,
        unaligned=("L", "M", "width"),
        archs=archs,
    )


def row_variant(name, kernel, signature, constants, archs=ARCHS):
    constants = ROWS | constants
    return Variant(
        name, f"{MODULE}:{kernel}", signature, constants, triton_attention.ROW_WARPS, unaligned=("count",), archs=archs
    )


CHANNELS = {"v": "*bf16", "inverse": "*fp32", "count": "i32", "stride": "i32"}
VARIANTS = [
    attend_variant("int8"),
    attend_variant("int8", GEFORCE, True),
    attend_variant("full-int8"),
    attend_variant("fp8", FLOAT8),
    attend_variant("fp8", (89, 120), True),
    attend_variant("exact", listed=True),
    attend_variant("int8", listed=True),
    attend_variant("int8", GEFORCE, True, listed=True),
    attend_variant("full-int8", listed=True),
    attend_variant("fp8", FLOAT8, listed=True),
    attend_variant("fp8", (89, 120), True, listed=True),
    row_variant(
        "quantize",
        "quantize_kernel",
        {"x": "*bf16", "mean": "*fp32", "codes": "*i8", "scales": "*fp32", "count": "i32", "factor": "fp32"},
        {},
    ),
    row_variant(
        "values, int8",
        "values_kernel",
        {"v": "*bf16", "scales": "*fp32", "out": "*fp16", "count": "i32"},
        {},
    ),
    row_variant("values, full-int8", "channels_kernel", CHANNELS | {"out": "*i8", "sums": "*i32"}, {}),
    row_variant("values, fp8", "channels_kernel", CHANNELS | {"out": "*fp8e4nv"}, {"sums": None}, FLOAT8),
]
# Instructions of tensor cores by architecture: those of Hopper, of Blackwell's server chips, and of all others.
SCORES = {90: "IGMMA", 100: "UTCIMMA"}
MIXING = {
    "exact": ("HMMA", {90: "HGMMA", 100: "UTCHMMA"}),
    "int8": ("HMMA", {90: "HGMMA", 100: "UTCHMMA"}),
    "full-int8": ("IMMA", SCORES),
    "fp8": ("QMMA", {90: "QGMMA", 100: "UTCQMMA"}),
}


@pytest.fixture(scope="module")
def cubins():
    return Cubins(VARIANTS)


@pytest.mark.parametrize(("name", "arch"), cases(VARIANTS))
def test_cubin(cubins, name, arch):
    cubin = cubins[name, arch]
    assert cubin.stack == 0
    assert cubin.shared <= SHARED_LIMIT[arch]
    assert cubin.count("STG.E.128")
    if not name.startswith("attend"):
        assert cubin.per_element(triton_attention.ROWS * 128) < 18
        return
    usual, others = MIXING[name.split(", ")[1]]
    scores, values = SCORES.get(arch, "IMMA"), others.get(arch, usual)
    scores = values if "exact" in name else scores
    assert cubin.count(scores) and cubin.count(values)
    if values == "QMMA":
        assert cubin.count("QMMA.16832.F16" if "float16" in name else "QMMA.16832.F32")
    lists = 60 if "lists" in name else 0
    if arch != 100:  # which moves sums to and from a memory of their own
        # The start, the end, and a step of 64 keys twice, whole and masked: 32 scores of each thread.
        assert cubin.count("") - cubin.count(scores) - cubin.count(values) < (2050 if "full" in name else 1850) + lists
