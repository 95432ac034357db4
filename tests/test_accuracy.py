"""What each path costs in accuracy, beside float64 with the same blocks, on activations as models have them.

Weights have heavy tails and rows and columns of different size, as those of diffusion transformers do.
"""

from dataclasses import replace

import pytest
import torch

from skyrun.kernels import QuantizedWeight, linear
from skyrun.kernels.matmul import FEW_ROWS
from skyrun.quant import quantize

ROWS, OUT, COLS = 64, 48, 5120
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0", "IQ4_NL")
ACTIVATIONS = ("gauss", "heavy", "adaln", "gelu")
# Rounding of weights, activations and results: half a unit in the last place each, as a root of mean squares.
EXACT = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
FAST = 0.016


def generator(seed):
    return torch.Generator().manual_seed(seed)


def activations(kind):
    """[ROWS, COLS]: normal; heavy-tailed; channels of different gain, six of them hot; hidden ones of a GELU."""
    g = generator(ACTIVATIONS.index(kind))
    x = torch.randn(ROWS, COLS, generator=g)
    if kind == "heavy":
        x = x / (torch.randn(3, ROWS, COLS, generator=g).square().mean(0)).sqrt()
    elif kind == "adaln":
        x = x * torch.exp(0.5 * torch.randn(COLS, generator=g))
        x[:, torch.randperm(COLS, generator=g)[:6]] *= 12
    elif kind == "gelu":
        x = torch.nn.functional.gelu(x * 1.2, approximate="tanh")
        x[:, torch.randperm(COLS, generator=g)[:4]] += 14
    return x


def weight_values():
    """float32 [OUT, COLS]."""
    g = generator(9)
    values = torch.randn(OUT, COLS, generator=g) / torch.randn(5, OUT, COLS, generator=g).square().mean(0).sqrt()
    values *= torch.exp(0.3 * torch.randn(OUT, 1, generator=g)) * torch.exp(0.3 * torch.randn(COLS, generator=g))
    return values * COLS**-0.5


@pytest.fixture(scope="module")
def weights():
    values = weight_values()
    return {type: QuantizedWeight(quantize(values, type), type) for type in TYPES}


def relative(result, reference):
    return float((result.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("type", TYPES)
def test_exact_products(weights, type, kind):
    weight, x = weights[type], activations(kind)
    for dtype, allowed in EXACT.items():
        rounded = x.to(dtype)
        reference = rounded.double() @ weight.dense(torch.float32).double().T
        assert relative(linear(rounded, weight), reference) < allowed


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("type", TYPES)
def test_fast_products_add_little(weights, type, kind):
    weight, x = weights[type], activations(kind)
    reference = x.double() @ weight.dense(torch.float32).double().T
    error = relative(linear(x, replace(weight, fast=True)), reference)
    assert 0.005 < error < FAST  # if it were none, nothing would have been rounded


def test_without_the_rotation_it_would_be_far_more(weights):
    """What the rotation is for: rows quantized as they are."""
    weight, x = weights["Q4_K"].dense(torch.float32), activations("adaln")
    reference = x.double() @ weight.double().T

    def rounded(t):
        scale = t.abs().amax(1, keepdim=True) / 127
        return (t / scale).round() * scale

    assert relative(rounded(x) @ rounded(weight).T, reference) > 2 * FAST


def test_few_and_many_rows_agree(weights):
    weight, x = weights["Q4_K"], activations("gauss")
    together = linear(x, weight)
    for rows in (1, FEW_ROWS):
        torch.testing.assert_close(linear(x[:rows], weight), together[:rows], rtol=1e-4, atol=1e-4)


def test_rows_may_have_any_shape(weights):
    x = activations("gauss")
    for weight in (weights["Q4_K"], replace(weights["Q4_K"], fast=True)):
        flat, bias = linear(x, weight), torch.randn(OUT)
        assert torch.equal(linear(x.view(2, 4, -1, COLS), weight), flat.view(2, 4, -1, OUT))
        summed = linear(x.view(2, -1, COLS), weight, bias, gate=bias, residual=flat.view(2, -1, OUT))
        torch.testing.assert_close(summed.view(-1, OUT), flat + bias * (flat + bias), rtol=1e-4, atol=1e-4)
