"""The fused small steps: twins against float64, Triton's kernels against the twins."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from skyrun.kernels import torch_elementwise, torch_int8, triton_elementwise
from skyrun.kernels.rotated import RotatedInt8

NAMES = ("layer_norm", "rms_norm", "gelu", "add_gated", "quantize_rows")
SHAPES = ((1, 256), (3, 512), (5, 1280), (2, 5120), (1, 13824))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the result against the twin's: the interpreter cuts bfloat16 off where hardware rounds it.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
twin = torch_elementwise


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(rows, half):
    turned = numbers(rows, half, seed=7)
    return turned.cos(), turned.sin()


def same(result, reference, dtype):
    assert result.dtype == dtype
    assert result.shape == reference.shape
    error = (result.double() - reference.double()).abs() / (reference.double().abs() + 1e-2)
    assert error.numel() == 0 or float(error.max()) <= TOLERANCE[dtype]


def same_rows(result, reference):
    """The same rows in rotated int8: products in float16 move a number to the next level now and then."""
    assert isinstance(result, RotatedInt8)
    assert result.dtype == reference.dtype
    torch.testing.assert_close(result.scales, reference.scales, rtol=2e-3, atol=0)
    off = (result.codes.int() - reference.codes.int()).abs()
    assert off.numel() == 0 or int(off.max()) <= 1
    assert off.numel() == 0 or float(off.float().mean()) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_one_signature(name):
    assert inspect.signature(getattr(triton_elementwise, name)) == inspect.signature(getattr(twin, name))


def test_layer_norm_is_its_definition():
    x, gain, shift = numbers(4, 512) * 3 + 1, numbers(512, seed=1), numbers(512, seed=2)
    wide = x.double()
    normed = (wide - wide.mean(1, keepdim=True)) / (wide.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(twin.layer_norm(x, gain, shift, 1e-6).double(), normed * gain + shift, **CLOSE)


def test_rms_norm_and_rotary_embedding_are_their_definition():
    x, weight, (cos, sin) = numbers(4, 512), numbers(512, seed=1), angles(4, 64)
    wide = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(twin.rms_norm(x, weight, 1e-6).double(), wide, **CLOSE)
    pairs = torch.view_as_complex(wide.view(4, 4, 64, 2)) * torch.complex(cos, sin).unsqueeze(1)
    turned = torch.view_as_real(pairs).flatten(1)
    torch.testing.assert_close(twin.rms_norm(x, weight, 1e-6, (cos, sin)).double(), turned, **CLOSE)


def test_gelu_is_its_definition():
    x = numbers(3, 256).double() * 4
    u = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    torch.testing.assert_close(twin.gelu(x.float()).double(), x / 2 * (1 + u.tanh()), **CLOSE)


def test_gated_sums_are_their_definition():
    x, y, gate = numbers(3, 256), numbers(3, 256, seed=1), numbers(256, seed=2)
    torch.testing.assert_close(twin.add_gated(x, y, gate), x + gate * y)
    torch.testing.assert_close(twin.add_gated(x, y), x + y)


def test_rotated_results_are_the_rotated_plain_ones():
    x, gain, shift = numbers(4, 512), numbers(512, seed=1), numbers(512, seed=2)
    for result, plain in (
        (twin.layer_norm(x, gain, shift, 1e-6, True), twin.layer_norm(x, gain, shift, 1e-6)),
        (twin.gelu(x, True), F.gelu(x, approximate="tanh")),
        (twin.quantize_rows(x), x),
    ):
        restored = torch_int8.rotate(result.codes.float() * result.scales.unsqueeze(1))
        assert float((restored - plain).norm() / plain.norm()) < 0.015


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape, dtype):
    x = numbers(*shape, dtype=dtype) * 2 + 0.5
    gain, shift = numbers(shape[1], seed=1), numbers(shape[1], seed=2)
    same(triton_elementwise.layer_norm(x, gain, shift, 1e-6), twin.layer_norm(x, gain, shift, 1e-6), dtype)
    rotated = triton_elementwise.layer_norm(x, gain, shift, 1e-6, rotated=True)
    same_rows(rotated, twin.layer_norm(x, gain, shift, 1e-6, rotated=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    x, weight = numbers(*shape, dtype=dtype), numbers(shape[1], seed=1)
    same(triton_elementwise.rms_norm(x, weight, 1e-6), twin.rms_norm(x, weight, 1e-6), dtype)
    rope = angles(shape[0], 64)
    same(triton_elementwise.rms_norm(x, weight, 1e-6, rope), twin.rms_norm(x, weight, 1e-6, rope), dtype)


@pytest.mark.parametrize("half", [1, 8, 128])
def test_heads_of_other_widths(half):
    x, weight, rope = numbers(2, 512), numbers(512, seed=1), angles(2, half)
    same(triton_elementwise.rms_norm(x, weight, 1e-6, rope), twin.rms_norm(x, weight, 1e-6, rope), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape, dtype):
    x = numbers(*shape, dtype=dtype) * 3
    same(triton_elementwise.gelu(x), twin.gelu(x), dtype)
    same_rows(triton_elementwise.gelu(x, rotated=True), twin.gelu(x, rotated=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 100), *SHAPES])
def test_add_gated(shape, dtype):
    x, y, gate = numbers(*shape, dtype=dtype), numbers(*shape, seed=1, dtype=dtype), numbers(shape[1], seed=2)
    same(triton_elementwise.add_gated(x, y, gate), twin.add_gated(x, y, gate), dtype)
    same(triton_elementwise.add_gated(x, y), twin.add_gated(x, y), dtype)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4, 1e20])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_any_size(shape, size):
    x = numbers(*shape) * size
    same_rows(triton_elementwise.quantize_rows(x), twin.quantize_rows(x))


@pytest.mark.parametrize("module", [twin, triton_elementwise])
def test_a_row_of_zeros_stays_one(module):
    rows = module.quantize_rows(torch.cat((torch.zeros(1, 256), torch.ones(1, 256))))
    assert rows.scales[0] == 0 and rows.scales[1] > 0
    assert not rows.codes[0].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("module", [twin, triton_elementwise])
def test_what_is_no_number_is_not_hidden(module, bad):
    x = numbers(2, 512)
    x[1, 300] = bad
    for rows in (module.quantize_rows(x), module.layer_norm(x, torch.ones(512), torch.zeros(512), 1e-6, True)):
        assert rows.scales[0].isfinite()
        assert not rows.scales[1].isfinite()


@pytest.mark.parametrize("module", [twin, triton_elementwise])
def test_rows_do_not_depend_on_how_many_pass_at_a_time(module):
    x, weight, rope = numbers(5, 512), numbers(512, seed=1), angles(5, 64)
    whole = module.rms_norm(x, weight, 1e-6, rope)
    parts = [module.rms_norm(x[n : n + 2], weight, 1e-6, (rope[0][n : n + 2], rope[1][n : n + 2])) for n in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.cat([module.gelu(x[n : n + 2]) for n in (0, 2, 4)]), module.gelu(x))


@pytest.mark.parametrize("module", [twin, triton_elementwise])
def test_rows_with_gaps_between_them(module):
    wide = numbers(3, 1024)
    x, weight = wide[:, 256:768], numbers(512, seed=1)
    assert torch.equal(module.rms_norm(x, weight, 1e-6), module.rms_norm(x.contiguous(), weight, 1e-6))
    assert torch.equal(module.add_gated(x, x, weight), module.add_gated(x.contiguous(), x.contiguous(), weight))
    assert torch.equal(module.quantize_rows(x).codes, module.quantize_rows(x.contiguous()).codes)


@pytest.mark.parametrize("module", [twin, triton_elementwise])
def test_no_rows_at_all(module):
    x, weight = torch.empty(0, 256), torch.ones(256)
    assert module.layer_norm(x, weight, weight, 1e-6).shape == (0, 256)
    assert module.rms_norm(x, weight, 1e-6).shape == module.gelu(x).shape == module.add_gated(x, x).shape == (0, 256)
    assert module.gelu(x, rotated=True).codes.shape == (0, 256)


@pytest.mark.parametrize("module", [twin, triton_elementwise])
def test_rows_that_are_not_whole_groups_cannot_be_rotated(module):
    with pytest.raises(ValueError, match="rows of 300 are not whole groups of 256"):
        module.gelu(torch.zeros(2, 300), rotated=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 256), (333, 5120), (1000, 13824)])
def test_on_a_gpu(shape, dtype):
    """Against the twins on the CPU, twice: two runs that differ would be a race."""
    x, y = numbers(*shape, dtype=dtype), numbers(*shape, seed=1, dtype=dtype)
    gain, shift, rope = numbers(shape[1], seed=2), numbers(shape[1], seed=3), angles(shape[0], 64)
    on_gpu = [t.cuda() for t in (x, y, gain, shift, *rope)]

    def plain(module, x, y, gain, shift, cos, sin):
        return (
            module.layer_norm(x, gain, shift, 1e-6),
            module.rms_norm(x, gain, 1e-6, (cos, sin)),
            module.gelu(x),
            module.add_gated(x, y, gain),
        )

    def rotated(module, x, gain, shift):
        return module.layer_norm(x, gain, shift, 1e-6, True), module.gelu(x, True), module.quantize_rows(x)

    first, second = plain(triton_elementwise, *on_gpu), plain(triton_elementwise, *on_gpu)
    for result, again, expected in zip(first, second, plain(twin, x, y, gain, shift, *rope), strict=True):
        assert torch.equal(result, again)
        same(result.cpu(), expected, dtype)
    results = rotated(triton_elementwise, on_gpu[0], *on_gpu[2:4])
    for result, expected in zip(results, rotated(twin, x, gain, shift), strict=True):
        same_rows(RotatedInt8(result.codes.cpu(), result.scales.cpu(), dtype), expected)
