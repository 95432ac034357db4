"""Products of rotated int8 rows: the twin against float64, Triton's kernel against the twin."""

import inspect
from dataclasses import replace

import pytest
import torch
from cubins import ARCHS, SHARED_LIMIT, Cubins, Variant, cases
from guards import guarded

from skyrun.kernels.rotated import RotatedInt8
from skyrun.kernels.torch import int8 as torch_int8
from skyrun.kernels.torch.int8 import quantize_rows, rotate
from skyrun.kernels.triton import int8 as triton_int8

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # the interpreter cuts bfloat16 off
SHAPES = ((1, 256, 3), (17, 512, 130), (130, 256, 257), (3, 1280, 64))  # M, K, N


def operands(m, k, n, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(m * k + n)
    x, w = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    extras = [torch.randn(n, generator=generator) for _ in range(2)] + [
        torch.randn(m, n, generator=generator).to(dtype)
    ]
    rows = [RotatedInt8(t.codes.to(device), t.scales.to(device), dtype) for t in map(quantize_rows, (x, w))]
    return *rows, *(t.to(device) for t in extras)


def exact(x, w):
    return (x.codes.double() * x.scales[:, None]) @ (w.codes.double() * w.scales[:, None]).T


def test_turning_keeps_products_and_lengths():
    x, w = torch.randn(3, 1024).double(), torch.randn(5, 1024).double()
    torch.testing.assert_close(rotate(x) @ rotate(w).T, x @ w.T)
    torch.testing.assert_close(rotate(rotate(x)), x)


def test_the_matrix_is_the_regular_hadamard_matrix():
    matrix = rotate(torch.eye(256, dtype=torch.float64))
    assert torch.equal((matrix * 16).abs(), torch.ones(256, 256, dtype=torch.float64))
    sums = matrix.sum(0)
    torch.testing.assert_close(sums.abs(), torch.ones(256).double())  # a mean of one becomes one everywhere
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(256).double())


def test_twins_have_one_signature():
    assert inspect.signature(torch_int8.multiply) == inspect.signature(triton_int8.multiply)


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_the_twin(m, k, n):
    x, w, bias, gate, residual = operands(m, k, n)
    product = exact(x, w)
    torch.testing.assert_close(torch_int8.multiply(x, w).double(), product, rtol=1e-5, atol=1e-5)
    whole = residual + gate * (product + bias)
    torch.testing.assert_close(torch_int8.multiply(x, w, bias, gate, residual).double(), whole, rtol=1e-5, atol=1e-4)


def test_the_twin_takes_rows_in_turn(monkeypatch):
    x, w, bias, gate, residual = operands(40, 256, 8)
    whole = torch_int8.multiply(x, w, bias, gate, residual)
    monkeypatch.setattr(torch_int8, "_CHUNK_ROWS", 18)
    assert torch.equal(torch_int8.multiply(x, w, bias, gate, residual), whole)


def test_the_twin_asks_no_more_than_cuda_gives(monkeypatch):
    """cuBLAS refuses 16 rows and fewer, which the last ones taken can be, and columns that are no multiple of 8."""
    product = torch._int_mm

    def strict(x, w):
        assert len(x) > 16 and x.shape[1] % 8 == 0 and w.shape[1] % 8 == 0
        return product(x, w)

    monkeypatch.setattr(torch, "_int_mm", strict)
    monkeypatch.setattr(torch_int8, "_CHUNK_ROWS", 40)
    for rows in (1, 16, 17, 40, 41, 57):
        x, w, *extras = operands(rows, 256, 13)
        whole = extras[2] + extras[1] * (exact(x, w) + extras[0])
        torch.testing.assert_close(torch_int8.multiply(x, w, *extras).double(), whole, rtol=1e-5, atol=1e-4)


def close(result, reference, dtype):
    assert result.dtype == dtype
    assert float((result.double() - reference.double()).norm() / reference.double().norm()) < ROUNDING[dtype]


@pytest.mark.parametrize(
    "tile", [triton_int8.LARGE, triton_int8.SUMMING, triton_int8.SMALL], ids=["large", "summing", "small"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_the_kernel(m, k, n, dtype, tile):
    x, w, *extras = operands(m, k, n, dtype)
    for given in ((None, None, None), (extras[0], None, None), (extras[0], None, extras[2]), tuple(extras)):
        with guarded():
            result = triton_int8._multiply(x, w, *given, tile)
        close(result, torch_int8.multiply(x, w, *given), dtype)


def test_the_widest_sum_of_the_models_does_not_overflow():
    x = RotatedInt8(torch.full((1, 13824), 127, dtype=torch.int8), torch.ones(1), torch.float32)
    product = triton_int8.multiply(x, x)
    assert float(product) == 127 * 127 * 13824


def test_tiles_in_every_order_are_made_once():
    """More rows of tiles than share a band, and a band that is not full."""
    x, w, *extras = operands(2 * 8 * 16 + 5, 256, 40)
    tile = replace(triton_int8.SMALL, rows=16, cols=16)
    close(triton_int8._multiply(x, w, *extras, tile), torch_int8.multiply(x, w, *extras), torch.float32)


REGISTERS = tuple(arch for arch in ARCHS if arch != 100)  # where sums are in registers


def variant(name, tile, out, k, archs=ARCHS, **extras):
    pointers = {"x": "*i8", "w": "*i8", "x_scales": "*fp32", "w_scales": "*fp32", "out": out, "M": "i32", "N": "i32"}
    left_out = {key: None for key in ("bias", "gate", "residual") if key not in extras}
    constants = {"K": k, "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "ORDER": triton_int8._ORDER}
    return Variant(
        name,
        "skyrun.kernels.triton.int8:multiply_kernel",
        pointers | extras,
        constants | left_out,
        warps=tile.warps,
        stages=tile.stages,
        unaligned=("M",),
        archs=archs,
    )


GATED = {"bias": "*fp32", "gate": "*fp32", "residual": "*bf16"}
VARIANTS = [
    variant("bias", triton_int8.LARGE, "*bf16", 5120, REGISTERS, bias="*fp32"),
    variant("gated sum", triton_int8.SUMMING, "*bf16", 13824, REGISTERS, **GATED),
    variant("bias, in tensor memory", triton_int8.MIDDLE, "*bf16", 5120, (100,), bias="*fp32"),
    variant("gated sum, in tensor memory", triton_int8.MIDDLE, "*bf16", 13824, (100,), **GATED),
    variant("few rows", triton_int8.SMALL, "*bf16", 5120, bias="*fp32"),
]


@pytest.fixture(scope="module")
def cubins():
    return Cubins(VARIANTS)


@pytest.mark.parametrize(("name", "arch"), cases(VARIANTS))
def test_cubin(cubins, name, arch):
    cubin = cubins[name, arch]
    assert cubin.stack == 0
    assert cubin.shared <= SHARED_LIMIT[arch]
    assert cubin.count("STG.E.128")
    if arch in (90, 100):
        assert cubin.count("IGMMA" if arch == 90 else "UTCIMMA")
    else:  # what is not a product is the start, the end, and less than one per product in between
        assert cubin.count("IMMA") >= 64
        assert cubin.count("") - cubin.count("IMMA") < 1300


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [*SHAPES, (1000, 5120, 5120), (777, 13824, 5120)])
def test_on_a_gpu(m, k, n, dtype):
    x, w, *extras = operands(m, k, n, dtype, "cuda")
    with guarded():
        result, again = (triton_int8.multiply(x, w, *extras) for _ in range(2))
    assert torch.equal(result, again)
    on_cpu = [RotatedInt8(t.codes.cpu(), t.scales.cpu(), dtype) for t in (x, w)]
    close(result.cpu(), torch_int8.multiply(*on_cpu, *(t.cpu() for t in extras)), dtype)
    close(torch_int8.multiply(x, w, *extras), result, dtype)
