"""The fused small steps: twins against float64, Triton's kernels against the twins."""

import inspect
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from skyrun.kernels.rotated import RotatedInt8
from skyrun.kernels.torch import elementwise as torch_elementwise
from skyrun.kernels.torch import int8 as torch_int8
from skyrun.kernels.triton import elementwise as triton_elementwise

NAMES = ("layer_norm", "rms_norm", "gelu", "add_gated", "quantize_rows", "norm_silu")
SHAPES = ((1, 256), (17, 256), (3, 512), (5, 1280), (3, 5120), (1, 13824))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the result against the twin's. In float32 it is the twin's own error: its GELU cancels in the tail, where 1 + tanh
# is nearly 0, and is 1.5e-5 off float64, the kernel's 4e-7. In bfloat16 the interpreter cuts off, hardware rounds.
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
    torch.testing.assert_close(result.scales, reference.scales, rtol=1e-3, atol=0)
    off = (result.codes.int() - reference.codes.int()).abs()
    assert off.numel() == 0 or int(off.max()) <= 1
    # One in a hundred is expected: float16's rounding against the width of a level. Few numbers scatter about that.
    assert off.numel() == 0 or float(off.float().mean()) < (0.012 if off.numel() > 5000 else 0.02)


def everything(module, x, y, gain, shift, rope):
    """All that the module makes of some rows, by name."""
    return {
        "layer norm": module.layer_norm(x, gain, shift, 1e-6),
        "layer norm, rotated": module.layer_norm(x, gain, shift, 1e-6, rotated=True),
        "RMS norm": module.rms_norm(x, gain, 1e-6),
        "RMS norm, rope": module.rms_norm(x, gain, 1e-6, rope),
        "GELU": module.gelu(x),
        "GELU, rotated": module.gelu(x, rotated=True),
        "sum": module.add_gated(x, y),
        "gated sum": module.add_gated(x, y, gain),
        "rows": module.quantize_rows(x),
    }


def tensors(result):
    return [result.codes, result.scales] if isinstance(result, RotatedInt8) else [result]


@contextmanager
def between_guards(monkeypatch):
    """Results start as what no kernel writes, NaN or -128, between more rows than a tile has, which nobody touches."""
    made, guard = [], 8

    def empty(size, *, dtype, device):
        rows, *rest = (size,) if isinstance(size, int) else size
        poison = -128 if dtype == torch.int8 else float("nan")
        made.append(torch.full((rows + 2 * guard, *rest), poison, dtype=dtype, device=device))
        return made[-1][guard:-guard]

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", empty)
        yield
    assert made
    for buffer in made:
        untouched = buffer == -128 if buffer.dtype == torch.int8 else buffer.isnan()
        assert untouched[:guard].all() and untouched[-guard:].all()
        assert not untouched[guard:-guard].any()


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


def norm_silu(module, x, weight):
    """Written into a part of a larger tensor, whose other frames stay as they are."""
    wide = torch.full((len(x) + 3, *x.shape[1:]), 7.0, dtype=x.dtype, device=x.device)
    module.norm_silu(x, weight, 1e-24, wide[2:-1])
    assert (wide[:2] == 7).all() and (wide[-1] == 7).all()
    return wide[2:-1]


def test_norm_and_silu_are_their_definition():
    x, weight = numbers(2, 3, 5, 96) * 3, numbers(96, seed=1)
    wide = x.double() / x.double().square().mean(3, keepdim=True).sqrt() * weight
    torch.testing.assert_close(norm_silu(twin, x, weight).double(), wide / (1 + (-wide).exp()), **CLOSE)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # exp of the SiLU of large negative numbers: 0
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 1, 1, 8), (3, 5, 7, 96), (2, 9, 4, 192), (1, 3, 5, 384), (4, 20, 3, 8)]
)
def test_norm_and_silu(shape, dtype, monkeypatch):
    monkeypatch.setattr(twin, "_CACHED", 1000)  # in several parts
    x, weight = numbers(*shape, dtype=dtype) * 3, numbers(shape[-1], seed=1)
    same(norm_silu(triton_elementwise, x, weight), norm_silu(twin, x, weight), dtype)


@pytest.mark.parametrize("module", [twin, triton_elementwise])
def test_norm_and_silu_of_a_slab(module):
    frames, weight = numbers(2, 9, 4, 8), numbers(8, seed=1)
    assert torch.equal(norm_silu(module, frames[:, 2:7], weight), norm_silu(module, frames, weight)[:, 2:7])
    channels_first = frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(norm_silu(module, channels_first, weight), norm_silu(module, frames, weight))


@pytest.mark.parametrize("module", [twin, triton_elementwise])
def test_norm_and_silu_of_zeros_are_zeros(module):
    assert not norm_silu(module, torch.zeros(1, 2, 3, 96), torch.ones(96)).any()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
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


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # exp of the GELU of large negative numbers: 0
@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_numbers_of_any_size(size):
    x, y, (gain, shift) = numbers(3, 1280) * size, numbers(3, 1280, seed=1), numbers(2, 1280, seed=2)
    expected = everything(twin, x, y, gain, shift, angles(3, 64))
    for name, result in everything(triton_elementwise, x, y, gain, shift, angles(3, 64)).items():
        if isinstance(result, RotatedInt8):
            same_rows(result, expected[name])
        else:
            unit = float(expected[name].abs().max())
            same(result / unit, expected[name] / unit, torch.float32)


@pytest.mark.parametrize("size", [1.0, 1e20])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_any_size(shape, size):
    x = numbers(*shape) * size
    same_rows(triton_elementwise.quantize_rows(x), twin.quantize_rows(x))


@pytest.mark.parametrize("cols", [256, 1280])
def test_every_number_is_written_and_nothing_else(cols, monkeypatch):
    x, gain = numbers(5, cols), numbers(cols, seed=1)
    with between_guards(monkeypatch):
        everything(triton_elementwise, x, x, gain, gain, angles(5, 64))


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
    x, y, gain, shift, rope = (numbers(5, 512), numbers(5, 512, seed=1), *numbers(2, 512, seed=2), angles(5, 64))
    whole = everything(module, x, y, gain, shift, rope)
    slices = [slice(start, start + 2) for start in (0, 2, 4)]
    parts = [everything(module, x[n], y[n], gain, shift, (rope[0][n], rope[1][n])) for n in slices]
    for name, result in whole.items():
        pieces = zip(*(tensors(part[name]) for part in parts), strict=True)
        for piece, expected in zip(pieces, tensors(result), strict=True):
            assert torch.equal(torch.cat(piece), expected), name


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
    for result in everything(module, x, x, weight, weight, angles(0, 64)).values():
        assert result.shape == (0, 256)


@pytest.mark.parametrize("module", [twin, triton_elementwise])
def test_sums_have_the_type_of_the_first(module):
    x, y, gate = numbers(2, 256, dtype=torch.float16), numbers(2, 256, seed=1), numbers(256, seed=2)
    same(module.add_gated(x, y), x.float() + y, torch.float16)
    same(module.add_gated(x, y, gate), x.float() + gate * y, torch.float16)


@pytest.mark.parametrize("module", [twin, triton_elementwise])
@pytest.mark.parametrize("rope", [None, angles(5, 64)])
def test_results_may_take_the_memory_of_what_they_are_made_from(module, rope):
    """And are then in its dtype, or that of a view of it."""
    x, y, gain = numbers(5, 512), numbers(5, 512, seed=1), numbers(512, seed=2)
    wide, tall = torch.full((9, 512), 7.0), x.clone()
    normed = module.rms_norm(x, gain, 1e-6, rope, out=wide[2:7])
    assert torch.equal(normed, module.rms_norm(x, gain, 1e-6, rope)) and (wide[:2] == 7).all() and (wide[7:] == 7).all()
    for name, other in (("rms_norm", (gain, 1e-6, rope)), ("gelu", (False,)), ("add_gated", (y, gain))):
        result = getattr(module, name)(tall, *other, out=tall)
        assert result.data_ptr() == tall.data_ptr()
        assert torch.equal(result, getattr(module, name)(x, *other)), name
        tall.copy_(x)
    for gate in (gain, None):
        short = y.half()
        total = module.add_gated(x.bfloat16(), short, gate, out=short.view(torch.bfloat16))
        assert total.data_ptr() == short.data_ptr()
        same(total, x.bfloat16().float() + y.half() * (1 if gate is None else gate), torch.bfloat16)


@pytest.mark.parametrize("module", [twin, triton_elementwise])
def test_a_norm_may_have_another_dtype(module):
    x, gain, shift = numbers(5, 512, dtype=torch.bfloat16), numbers(512, seed=1), numbers(512, seed=2)
    expected = twin.layer_norm(x.float(), gain, shift, 1e-6)
    same(module.layer_norm(x, gain, shift, 1e-6, dtype=torch.float16), expected, torch.float16)
    assert module.layer_norm(x, gain, shift, 1e-6, True, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("module", [twin, triton_elementwise])
def test_rows_that_are_not_whole_groups_cannot_be_rotated(module):
    with pytest.raises(ValueError, match="rows of 300 are not whole groups of 256"):
        module.gelu(torch.zeros(2, 300), rotated=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 256), (333, 5120), (1000, 13824)])
def test_on_a_gpu(shape, dtype, monkeypatch):
    """Against the twins on the CPU, twice: two runs that differ would be a race."""
    x, y = numbers(*shape, dtype=dtype), numbers(*shape, seed=1, dtype=dtype)
    gain, shift, (cos, sin) = numbers(shape[1], seed=2), numbers(shape[1], seed=3), angles(shape[0], 64)
    x_, y_, gain_, shift_, cos_, sin_ = (t.cuda() for t in (x, y, gain, shift, cos, sin))
    with between_guards(monkeypatch):
        first, second = (everything(triton_elementwise, x_, y_, gain_, shift_, (cos_, sin_)) for _ in range(2))
    for name, expected in everything(twin, x, y, gain, shift, (cos, sin)).items():
        result = first[name]
        for once, again in zip(tensors(result), tensors(second[name]), strict=True):
            assert torch.equal(once, again), name
        if isinstance(result, RotatedInt8):
            same_rows(RotatedInt8(result.codes.cpu(), result.scales.cpu(), result.dtype), expected)
        else:
            same(result.cpu(), expected, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 97, 33, 96), (2, 41, 50, 384)])
def test_norm_and_silu_on_a_gpu(shape, dtype):
    x, weight = numbers(*shape, dtype=dtype), numbers(shape[-1], seed=1)
    same(norm_silu(triton_elementwise, x.cuda(), weight.cuda()).cpu(), norm_silu(twin, x, weight), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_not_hidden_on_a_gpu(bad):
    """A maximum on the GPU overlooks a NaN, the interpreter's does not."""
    x = numbers(3, 5120, dtype=torch.bfloat16).cuda()
    x[1, 3000] = bad
    ones = torch.ones(5120, device="cuda")
    for rows in (triton_elementwise.quantize_rows(x), triton_elementwise.layer_norm(x, ones, ones, 1e-6, True)):
        assert rows.scales.isfinite().tolist() == [True, False, True]
