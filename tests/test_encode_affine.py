"""Q2_K, Q4_K, Q5_K, Q4_1, Q5_1: errors against ggml's, whole tensors and hard rows, with and without importance."""

import json

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from skyrun.kernels import block_format, dequantize
from skyrun.quant import quantize

# Error to reach, relative to the better of ggml's two searches, and with importance relative to ggml's with it.
LIMITS = {"Q2_K": 0.97, "Q4_K": 0.985, "Q5_K": 0.96, "Q4_1": 0.99, "Q5_1": 0.987}
WEIGHTED_LIMITS = {"Q2_K": 0.82, "Q4_K": 0.905, "Q5_K": 0.8, "Q4_1": 0.94, "Q5_1": 0.935}
TYPES = list(LIMITS)
CODES = {"Q2_K": 3, "Q4_K": 15, "Q5_K": 31, "Q4_1": 15, "Q5_1": 31}


def relative_rmse(x, y, weight=None):
    weight = torch.ones(()) if weight is None else weight
    return float((weight * (x - y).square()).sum().sqrt() / (weight * x.square()).sum().sqrt())


@pytest.fixture(autouse=True)
def one_thread():
    """Tiles are too small to share, and threads that wait for each other make tests slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def coded(x, type, importance=None):
    return dequantize(quantize(x, type, importance), type)


@pytest.mark.parametrize("case", ["gauss", "student", "dit", "edge"])
@pytest.mark.parametrize("type", TYPES)
def test_error_against_the_better_of_ggmls_searches(goldens, type, case):
    inputs = goldens("quant/inputs")
    quick = json.loads((inputs.folder / "manifest.json").read_text())["types"][type]["rel_rmse"][case]
    thorough = json.loads((inputs.folder / "ones.json").read_text())["rel_rmse_ones"][type][case]
    limit = 1.015 if case == "edge" else LIMITS[type]  # sixteen rows of chance; each is compared below
    assert relative_rmse(inputs[case], coded(inputs[case], type)) <= limit * min(quick, thorough)


@pytest.mark.parametrize("type", TYPES)
def test_weighted_error_against_ggml_with_importance(goldens, type):
    inputs = goldens("quant/inputs")
    x, importance = inputs["dit"], inputs["dit_imatrix"]
    ggml = dequantize(goldens(f"quant/{type}")["dit_imat.bytes"], type)
    ours = relative_rmse(x, coded(x, type, importance), importance)
    assert ours <= WEIGHTED_LIMITS[type] * relative_rmse(x, ggml, importance)
    assert torch.equal(quantize(x, type, torch.zeros_like(importance)), quantize(x, type))


@pytest.mark.parametrize("type", TYPES)
def test_hard_rows_are_no_worse_than_ggmls(goldens, type):
    x, ggml = goldens("quant/inputs")["edge"], goldens(f"quant/{type}")["edge.deq"]
    ours, theirs = (coded(x, type) - x).norm(dim=1), (ggml - x).norm(dim=1)
    assert (ours <= theirs + 1e-3 * x.norm(dim=1)).all()


@pytest.mark.parametrize("case", ["gauss", "student", "dit", "edge"])
@pytest.mark.parametrize("type", ["Q4_1", "Q5_1"])
def test_plain_bytes_equal_ggml(goldens, type, case):
    x = goldens("quant/inputs")[case]
    plain = quantize(x, type, search=False)
    assert np.array_equal(plain.numpy(), quants.quantize(x.numpy(), GGMLQuantizationType[type]))
    assert torch.equal(dequantize(plain, type), goldens(f"quant/{type}")[f"{case}.deq"])
    if case != "edge":  # zero blocks have a zero of either sign for a minimum
        assert torch.equal(plain, goldens(f"quant/{type}")[f"{case}.bytes"])


@pytest.mark.parametrize("with_importance", [False, True])
@pytest.mark.parametrize("type", TYPES)
def test_bytes_depend_neither_on_chunks_nor_on_threads(type, with_importance):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 512, generator=generator)  # more than a tile of blocks
    importance = torch.rand(512, generator=generator) if with_importance else None
    whole = quantize(x, type, importance)
    torch.set_num_threads(3)
    assert torch.equal(quantize(x, type, importance), whole)
    torch.set_num_threads(1)
    for rows in (1, 7, 100):
        chunks = [quantize(x[start : start + rows], type, importance) for start in range(0, 4 * rows, rows)]
        assert torch.equal(torch.cat(chunks), whole[: 4 * rows])


@pytest.mark.parametrize("type", TYPES)
def test_a_group_takes_the_scale_its_neighbours_leave_it(type):
    """Zeros, a constant of either sign, and numbers a million times smaller, beside ordinary groups of one block."""
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    x[0, :32], x[1, :32], x[2, :32] = 0, -1, 1
    x[3, :32] *= 1e-6
    decoded = coded(x, type)
    assert float((decoded - x)[:, :32].abs().max()) <= 0.1
    assert float((decoded - x).abs().max()) <= 1.5 * float(x.abs().max()) / CODES[type]


def test_nothing_to_encode():
    for type in TYPES:
        assert quantize(torch.zeros(0, 256), type).shape == (0, block_format(type).row_bytes(256))


finite = st.floats(-65504, 65504, width=32)
rows = hnp.arrays("float32", (2, 256), elements=st.one_of(finite, st.floats(-1, 1, width=32), st.just(0.0)))


@pytest.mark.parametrize("type", TYPES)
@given(x=rows, exponent=st.floats(-45, 0), with_importance=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_finite_row_decodes_to_something_near(type, x, exponent, with_importance):
    x = torch.from_numpy(x) * 10.0**exponent
    importance = torch.linspace(0, 1, 256) ** 4 if with_importance else None
    decoded = coded(x, type, importance)
    assert torch.isfinite(decoded).all()
    if importance is None:
        # A step is at most the range of the block over the codes, and to clip more than one and a half never pays.
        # Below float16's smallest scale times the codes, weights may vanish.
        assert float((decoded - x).abs().max()) <= 3 * float(x.abs().max()) / CODES[type] + 1e-6


@pytest.mark.parametrize("type", TYPES)
def test_importance_of_one_column_is_exact_there(type):
    """All but one column free: that column's error vanishes."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    importance = torch.zeros(256)
    importance[100] = 1
    error = (coded(x, type, importance) - x)[:, 100]
    assert float(error.norm() / x[:, 100].norm()) <= 0.01
