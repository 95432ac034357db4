"""Decoding equals ggml bit for bit."""

import gguf
import numpy as np
import pytest
import torch

from skyrun.errors import SkyrunError
from skyrun.kernels import FORMATS, QuantizedWeight, dequantize, linear

TYPES = [name for name in FORMATS if name != "F32"]
CASES = ["gauss", "student", "edge", "dit", "random"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("type", TYPES)
def test_equals_ggml(goldens, type, case):
    golden = goldens(f"quant/{type}")
    assert torch.equal(dequantize(golden[f"{case}.bytes"], type), golden[f"{case}.deq"])


@pytest.mark.parametrize("type", TYPES)
def test_equals_gguf_py_on_any_bytes(type):
    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 256, (5, 3 * FORMATS[type].block_bytes), dtype=np.uint8)
    with np.errstate(invalid="ignore"):  # random scales include infinities, and their products with zero
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type])
    got = dequantize(torch.from_numpy(blocks), type).numpy()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("type", TYPES)
def test_other_dtypes_are_the_values_rounded_once(goldens, type, dtype):
    golden = goldens(f"quant/{type}")
    assert torch.equal(dequantize(golden["dit.bytes"], type, dtype), golden["dit.deq"].to(dtype))


def test_leading_axes_and_several_chunks():
    blocks = torch.randint(0, 255, (2, 70, 34 * 1024), dtype=torch.uint8)
    blocks[..., 1::34] = 0x2E  # finite scales
    whole = dequantize(blocks, "Q8_0")
    assert whole.shape == (2, 70, 32 * 1024)
    assert torch.equal(whole[1, 69], dequantize(blocks[1, 69], "Q8_0"))


def test_bad_blocks_are_refused():
    with pytest.raises(SkyrunError, match="unknown type 'Q9_K'"):
        dequantize(torch.zeros(1, 34, dtype=torch.uint8), "Q9_K")
    with pytest.raises(SkyrunError, match="multiple of 34 bytes"):
        dequantize(torch.zeros(1, 35, dtype=torch.uint8), "Q8_0")
    with pytest.raises(SkyrunError, match="expected uint8"):
        dequantize(torch.zeros(1, 34), "Q8_0")


@pytest.mark.parametrize("type", [name for name in TYPES if FORMATS[name].block_size > 1])
def test_linear_is_the_product_with_the_decoded_weight(goldens, type):
    golden = goldens(f"quant/{type}")
    weight = QuantizedWeight(golden["dit.bytes"], type)
    assert weight.shape == tuple(golden["dit.deq"].shape)
    x, bias = torch.randn(2, 3, weight.shape[1]), torch.randn(weight.shape[0])
    expected = x.double() @ golden["dit.deq"].double().T + bias
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-4, atol=1e-4)


def test_linear_keeps_the_dtype_of_its_input():
    weight, bias = torch.randn(6, 8), torch.randn(6)
    assert linear(torch.randn(3, 8).bfloat16(), weight, bias).dtype == torch.bfloat16
    assert linear(torch.randn(8), weight).shape == (6,)
