"""Kernels that decode on their way: a few rows times a weight, and a weight in rotated int8."""

import inspect

import pytest
import torch
from blocks import BLOCK_TYPES, random_blocks
from cubins import ARCHS, SHARED_LIMIT, Cubins, Variant, cases

from skyrun.kernels import QuantizedWeight
from skyrun.kernels.matmul import FEW_ROWS
from skyrun.kernels.planes import needs_planes, to_planes
from skyrun.kernels.torch import int8 as torch_int8
from skyrun.kernels.triton import encode as triton_encode
from skyrun.kernels.triton import few_rows as triton_few_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def multiplied(x, weight, bias=None):
    """As a launch does it, but in float32: there the interpreter multiplies right, and decoding can be compared."""
    return triton_few_rows._multiply(x, weight, bias, triton_few_rows.tl.float32)


def weight_of(type, rows, cols, planar=False):
    blocks = random_blocks(type, rows, cols)
    return QuantizedWeight(to_planes(blocks, type) if planar else blocks, type, planar)


def relative(result, reference):
    return float((result.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_few_rows(type, planar):
    if planar and not needs_planes(type):
        pytest.skip("its blocks stay as they are")
    weight = weight_of(type, 37, 768, planar)
    dense, bias = weight_of(type, 37, 768).dense(torch.float32).double(), torch.randn(37)
    for rows in (1, 3):
        x = torch.randn(rows, 768)
        assert relative(multiplied(x, weight), x.double() @ dense.T) < 1e-5
        assert relative(multiplied(x, weight, bias), x.double() @ dense.T + bias) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 17, FEW_ROWS])
def test_numbers_of_rows_and_types_of_activations(rows, dtype):
    weight, x = weight_of("Q4_K", 20, 512), torch.randn(rows, 512).to(dtype)
    reference = x.double() @ weight.dense(torch.float32).double().T
    result = multiplied(x, weight)
    assert result.dtype == dtype
    assert relative(result, reference) < ROUNDING[dtype]


@pytest.mark.parametrize("cols", [32, 96, 320])
@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q5_1"])
def test_rows_that_are_no_multiple_of_256(type, cols):
    weight, x = weight_of(type, 3, cols), torch.randn(2, cols)
    reference = x.double() @ weight.dense(torch.float32).double().T
    assert relative(multiplied(x, weight), reference) < 1e-5


def test_float16_rows_are_multiplied_in_float16():
    weight, x = weight_of("Q5_K", 20, 512), torch.randn(5, 512).half()
    reference = x.double() @ weight.dense(torch.float32).double().T
    assert 1e-6 < relative(triton_few_rows.multiply(x, weight), reference) < 1e-3


def test_the_longest_rows_and_gaps_between_them():
    weight, wide = weight_of("Q6_K", 2, 13824), torch.randn(3, 20000)
    x = wide[:, 100:13924]
    reference = x.double() @ weight.dense(torch.float32).double().T
    assert relative(multiplied(x, weight), reference) < 1e-5


def test_twins_have_one_signature():
    assert inspect.signature(torch_int8.encode_weight) == inspect.signature(triton_encode.encode_weight)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(3, 256), (2, 1280)])
@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_a_weight_in_rotated_int8(type, rows, cols, planar):
    if planar and not needs_planes(type):
        pytest.skip("its blocks stay as they are")
    ours = triton_encode.encode_weight(weight_of(type, rows, cols, planar))
    twin = torch_int8.encode_weight(weight_of(type, rows, cols))
    off = (ours.codes.int() - twin.codes.int()).abs()
    assert int(off.max()) <= 1
    assert float(off.float().mean()) < 0.02  # products in float16 move a number to the next level now and then
    torch.testing.assert_close(ours.scales, twin.scales, rtol=1e-3, atol=0)


@pytest.mark.parametrize("type", ["Q4_K", "Q8_0"])
def test_the_longest_row_in_rotated_int8(type):
    weight = weight_of(type, 1, 13824)
    ours, twin = triton_encode.encode_weight(weight), torch_int8.encode_weight(weight)
    assert int((ours.codes.int() - twin.codes.int()).abs().max()) <= 1


def test_a_row_of_zeros_stays_one():
    weight = QuantizedWeight(torch.zeros(2, 144, dtype=torch.uint8), "Q4_K")
    encoded = triton_encode.encode_weight(weight)
    assert not encoded.codes.any() and not encoded.scales.any()


def few_rows(type, archs, rows=1):
    pointers = {
        "x": "*bf16",
        "data": "*u8",
        "bias": "*fp32",
        "out": "*bf16",
        "M": "i32",
        "N": "i32",
        "n": "i32",
        "stride": "i32",
    }
    return Variant(
        f"{type} x {rows}",
        "skyrun.kernels.triton.few_rows:few_rows_kernel",
        pointers,
        triton_few_rows.constants(type, 5120, rows) | {"DOT": "tl.bfloat16"},
        warps=triton_few_rows.WARPS,
        unaligned=("M", "n"),
        archs=archs,
    )


def encode(type, archs, cols=5120):
    return Variant(
        f"encode {type} {cols}",
        "skyrun.kernels.triton.encode:encode_kernel",
        {"data": "*u8", "codes": "*i8", "scales": "*fp32", "n": "i32"},
        triton_encode.constants(type, cols),
        warps=triton_encode.row_warps(cols),
        unaligned=("n",),
        archs=archs,
    )


EVERY, ONE = ARCHS, (89,)
VARIANTS = [
    *(few_rows(type, EVERY if type in ("Q4_K", "Q8_0") else ONE) for type in BLOCK_TYPES),
    few_rows("Q6_K", ONE, FEW_ROWS),
    *(encode(type, EVERY if type in ("Q4_K", "Q6_K") else ONE) for type in BLOCK_TYPES),
    encode("Q5_K", ONE, 13824),
]


@pytest.fixture(scope="module")
def cubins():
    return Cubins(VARIANTS)


@pytest.mark.parametrize(("name", "arch"), cases(VARIANTS))
def test_cubin(cubins, name, arch):
    cubin = cubins[name, arch]
    assert cubin.stack == 0
    assert cubin.shared <= SHARED_LIMIT[arch]
    assert cubin.float16_matmuls
    if name.startswith("encode"):
        assert cubin.count("STG.E.128")
        assert cubin.per_element(int(name.split()[2])) < 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_on_a_gpu(type):
    weight, on_cpu = weight_of(type, 517, 5120, needs_planes(type)), weight_of(type, 517, 5120)
    weight = QuantizedWeight(weight.data.cuda(), type, weight.planar)
    dense = on_cpu.dense(torch.float32).double()
    for dtype in DTYPES[1:]:
        for rows in (1, 5, FEW_ROWS):
            x = torch.randn(rows, 5120).to(dtype)
            first, second = (triton_few_rows.multiply(x.cuda(), weight) for _ in range(2))
            assert torch.equal(first, second)
            assert relative(first.cpu(), x.double() @ dense.T) < 2 * ROUNDING[dtype]
    encoded, again = (triton_encode.encode_weight(weight) for _ in range(2))
    assert torch.equal(encoded.codes, again.codes)
    twin = torch_int8.encode_weight(on_cpu)
    assert int((encoded.codes.cpu().int() - twin.codes.int()).abs().max()) <= 1
