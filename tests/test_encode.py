"""Encoding: ggml's bytes where the format leaves no choice, at most ggml's error where it does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from skyrun.errors import SkyrunError
from skyrun.kernels import FORMATS, dequantize
from skyrun.quant import quantize
from skyrun.quant.encoders.encode import ENCODERS

CASES = ["gauss", "student", "edge", "dit"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0"])
def test_bytes_equal_ggml(goldens, type, case):
    assert torch.equal(quantize(goldens("quant/inputs")[case], type), goldens(f"quant/{type}")[f"{case}.bytes"])


@pytest.mark.parametrize("type", [type for type in ENCODERS if FORMATS[type].block_size > 1])
def test_each_hard_row_is_finite_and_close(goldens, type):
    for row in goldens("quant/inputs")["edge"]:
        decoded = dequantize(quantize(row[None], type), type)[0]
        assert torch.isfinite(decoded).all()
        # Codes of b bits step by at most the peak over 2^(b-1); tiny rows underflow float16 to zero.
        bits = int(type.strip("IQ")[0])
        assert float((decoded - row).abs().max()) <= float(row.abs().max()) / 2 ** (bits - 1) + 1e-7


rows = hnp.arrays("float32", (3, 256), elements=st.floats(-30000, 30000, width=32))


@given(rows)
@settings(max_examples=150, deadline=None)
def test_any_finite_row_decodes_to_something_near(x):
    x = torch.from_numpy(x)
    decoded = dequantize(quantize(x, "Q8_0"), "Q8_0")
    assert torch.isfinite(decoded).all()
    assert float((decoded - x).abs().max()) <= 2 * float(x.abs().max()) / 127 + 127 * 2**-25  # float16 scales


@pytest.mark.parametrize("type", list(ENCODERS))
def test_rows_do_not_depend_on_their_neighbours(type):
    x = torch.randn(37, 512)
    together = quantize(x, type)
    assert torch.equal(together[5:6], quantize(x[5:6], type))
    assert torch.equal(together, quantize(x, type))


@pytest.mark.parametrize("type", list(ENCODERS))
def test_the_largest_weights_stay_finite(type):
    rows = torch.full((3, 256), ENCODERS[type].largest)
    rows[1] *= -1
    rows[2] *= torch.linspace(-1, 1, 256)
    assert torch.isfinite(dequantize(quantize(rows, type), type)).all()


@pytest.mark.parametrize(
    ("x", "type", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "F32", "1 weights are NaN or infinite"),
        (torch.full((1, 256), float("inf")), "Q4_K", "256 weights are NaN or infinite"),
        (torch.full((1, 2), 1e5), "F16", "F16 holds up to 65504, got a weight of 100000"),
        (torch.full((1, 2), 3.4e38), "BF16", "BF16 holds up to 3.38953e\\+38"),
        (torch.full((1, 32), 1e9), "Q8_0", "Q8_0 holds up to 8.31901e\\+06"),
        (torch.full((1, 256), -1e9), "Q4_K", "Q4_K holds up to"),
        (torch.zeros(1, 100), "Q4_K", "a row of 100 weights cannot be Q4_K"),
        (torch.zeros(1, 256), "Q4", "unknown type 'Q4'"),
    ],
)
def test_what_cannot_be_encoded_is_refused(x, type, message):
    with pytest.raises(SkyrunError, match=message):
        quantize(x, type)
