"""Symmetric types: ggml's bytes without a search, less than ggml's error with one, however the blocks are divided."""

import json

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from skyrun.kernels import FORMATS, dequantize
from skyrun.quant import quantize
from skyrun.quant.encoders.encode import ENCODERS

# Our error is at most this part of the better of ggml's two searches, and of its search with importance.
BARS = {
    "Q6_K": (0.98, 0.9),
    "Q5_0": (0.995, 0.9),
    "Q4_0": (0.995, 0.9),
    "Q3_K": (0.995, 0.95),
    "IQ4_NL": (0.99, 0.95),
    "IQ4_XS": (0.99, 0.95),
}
PLAIN = ["Q8_0", "Q5_0", "Q4_0"]
SLACK = 1e-3  # rows that a format holds all but exactly, where the rounding of its scales to float16 decides


def relative_rmse(x, y, weight=1.0):
    """Over the last axis; 0 for zeros that stay zeros."""
    return ((weight * (x - y).square()).sum(-1) / (weight * x.square()).sum(-1)).sqrt().nan_to_num(0)


def decoded(x, type, importance=None):
    return dequantize(quantize(x, type, importance), type)


@pytest.fixture(scope="module")
def ggml(goldens):
    """What ggml reaches: manifest.json, ones.json and symmetric.json of its goldens."""
    folder = goldens("quant/inputs").folder
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("manifest", "ones", "symmetric")}


@pytest.mark.parametrize("case", ["gauss", "student", "dit", "edge"])
@pytest.mark.parametrize("type", BARS)
def test_error_is_below_both_of_ggmls_searches(goldens, ggml, type, case):
    x = goldens("quant/inputs")[case]
    quick = ggml["manifest"]["types"][type]["rel_rmse"][case]
    thorough = ggml["ones"]["rel_rmse_ones"][type][case]
    bar = BARS[type][0] if case != "edge" else 1
    assert relative_rmse(x.flatten(), decoded(x, type).flatten()) <= bar * min(quick, thorough)


@pytest.mark.parametrize("case", ["gauss", "student", "dit"])
@pytest.mark.parametrize("type", BARS)
def test_weighted_error_is_below_ggmls_search_with_importance(goldens, ggml, type, case):
    inputs = goldens("quant/inputs")
    x, importance = inputs[case], inputs["dit_imatrix"][: inputs[case].shape[1]]
    error = relative_rmse(x.flatten(), decoded(x, type, importance).flatten(), importance.expand_as(x).flatten())
    assert error <= BARS[type][1] * ggml["symmetric"]["weighted_rel_rmse"][type][case]


@pytest.mark.parametrize("type", BARS)
def test_no_hard_row_is_worse_than_with_ggml(goldens, ggml, type):
    x = goldens("quant/inputs")["edge"]
    excess = relative_rmse(x, decoded(x, type)) - torch.tensor(ggml["symmetric"]["edge_rows"][type])
    assert float(excess.max()) <= SLACK


@pytest.mark.parametrize("case", ["gauss", "student", "dit", "edge"])
@pytest.mark.parametrize("type", PLAIN)
def test_plain_bytes_equal_ggml(goldens, type, case):
    x = goldens("quant/inputs")[case]
    assert torch.equal(quantize(x, type, search=False), goldens(f"quant/{type}")[f"{case}.bytes"])


@pytest.mark.parametrize("type", PLAIN)
def test_plain_bytes_equal_gguf_py_where_magnitudes_tie_and_codes_fall_on_halves(type):
    x = torch.randint(-8, 9, (200, 512), generator=torch.Generator().manual_seed(1)).float()
    x *= 2.0 ** torch.arange(-25, 15).repeat(5).unsqueeze(1)
    expected = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[type])
    assert torch.equal(quantize(x, type, search=False), torch.from_numpy(expected))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("type", [*BARS, "Q8_0"])
def test_bytes_do_not_depend_on_how_rows_are_divided_or_on_threads(type, weighted):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2200, 256, generator=generator)
    importance = torch.randn(256, generator=generator).exp() if weighted else None
    together = quantize(x, type, importance)
    divided = [quantize(some, type, importance) for some in x.split([1, 7, 100, 2092])]
    assert torch.equal(together, torch.cat(divided))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(together[:300], quantize(x[:300], type, importance))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("type", BARS)
def test_importance_belongs_to_its_column(type):
    """Only the important columns are fitted: their error is far below that of the others."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    importance = torch.full((512,), 1e-6)
    importance[::16] = 1
    error = (decoded(x, type, importance) - x).square().mean(0)
    assert float(error[::16].mean()) < 0.2 * float(error.mean())


@given(hnp.arrays("float32", (2, 256), elements=st.floats(-500000, 500000, width=32)))
@settings(max_examples=40, deadline=None)
def test_any_finite_row_decodes_to_something_near(x):
    x = torch.from_numpy(x)
    for type in BARS:
        blocks = x.view(-1, FORMATS[type].block_size)
        y = decoded(blocks, type)
        assert torch.isfinite(y).all()
        peak = blocks.abs().amax(1)
        bits = int(type.strip("IQ")[0])
        # Below half of the smallest float16 there is no scale: up to 2^12 times that, a whole block may be lost.
        assert ((y - blocks).square().mean(1).sqrt() <= peak / 2 ** (bits - 1) + 2**-13).all()


@pytest.mark.parametrize("type", [*BARS, *PLAIN])
@pytest.mark.parametrize("search", [True, False])
def test_every_magnitude_decodes_finite(type, search):
    if not search and ENCODERS[type].plain is None:
        pytest.skip("always searches")
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(96, 256, generator=generator).sign() * 10 ** (torch.rand(96, 256, generator=generator) * 50 - 45)
    x[:48] *= 10 ** (torch.arange(48).unsqueeze(1) - 47.0)
    x.clamp_(-ENCODERS[type].largest, ENCODERS[type].largest)
    assert torch.isfinite(dequantize(quantize(x, type, search=search), type)).all()
