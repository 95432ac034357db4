"""Attention: every way and precision against its definition in float64, and kernels against their twins."""

import inspect
from importlib.metadata import version

import pytest
import torch
from float8 import rounded_as_on_a_card
from guards import guarded
from torch.nn import functional as F

from skyrun.kernels import attention
from skyrun.kernels.attention import Keys, PassingValues, attend, ways
from skyrun.kernels.machine.device import has_float8
from skyrun.kernels.quantized_keys import PRECISIONS, KeyRoom, QuantizedKeys, largest_values
from skyrun.kernels.torch import attention as torch_attention
from skyrun.kernels.triton import attention as triton_attention
from skyrun.presets.attention import ATTENTION_ERRORS

CPU = torch.device("cpu")
# Triton 3.6's interpreter cannot loop up to an argument with NumPy 2.4.
interpreted = pytest.mark.skipif(
    version("triton") < "3.7" and version("numpy") >= "2.4", reason="Triton 3.6 interprets no such loops with NumPy 2.4"
)
MODULES = [torch_attention, pytest.param(triton_attention, marks=interpreted)]
QUICK = PRECISIONS[1:]
# Relative errors by kind of softmax, as `inputs` has them. docs/kernels.md says the same.
BOUNDS = {
    "int8": {"flat": 0.002, "random": 0.01, "found": 0.008, "peaked": 0.019, "biased": 0.019},
    "full-int8": {"flat": 0.01, "random": 0.015, "found": 0.013, "peaked": 0.022, "biased": 0.022},
    "fp8": {"flat": 0.04, "random": 0.037, "found": 0.029, "peaked": 0.034, "biased": 0.034},
}
INT8 = BOUNDS["int8"]["peaked"]
NAMES = ("quantize_keys", "quantize_values", "write_values", "attend")


def definition(q, k, v, heads):
    q, k, v = (t.double().cpu().unflatten(1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)


def relative(result, reference):
    return float((result.double().cpu() - reference).norm() / reference.norm())


# How far scores spread: 1 is random queries and keys. At 2 the largest of 512 probabilities is 0.13 on average.
SPREAD = {"flat": 0.1, "random": 1.0, "peaked": 2.0, "biased": 2.0, "found": 1.0}


def inputs(queries, keys, heads, kind="peaked", dtype=torch.float32):
    """biased: all keys share a large part. found: every query is near one key."""
    g = torch.Generator().manual_seed(queries + keys)
    k, v = (torch.randn(keys, heads * 128, generator=g) for _ in range(2))
    q = SPREAD[kind] * torch.randn(queries, heads * 128, generator=g)
    if kind == "found":
        q += 0.6 * k[torch.randint(0, keys, (queries,), generator=g)]
    if kind == "biased":
        k = k + 8 * torch.randn(heads * 128, generator=g)
    return [t.to(dtype) for t in (q, k, v)]


def quantized(module, k, v, precision="int8"):
    return QuantizedKeys(precision, *module.quantize_keys(k), *module.quantize_values(v, precision))


def quick(module, q, k, v, precision="int8"):
    return module.attend(q, quantized(module, k, v, precision))


def test_on_a_cpu_it_is_torchs_own_and_in_other_precisions_the_twin():
    q, k, v = inputs(7, 9, 2)
    split = [t.unflatten(1, (2, -1)).transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*split).squeeze(0).transpose(0, 1).flatten(1)
    assert torch.equal(attend(q, Keys(k, v, 2)), expected)
    for precision in QUICK:
        keys, rounded = quantized(torch_attention, k, v, precision), Keys(k, v, 2, precision)
        for part in (slice(0, 4), slice(4, 7)):
            assert torch.equal(attend(q[part], rounded), torch_attention.attend(q[part], keys))
        assert list(ways(q, Keys(k, v, 2, precision))) == ["math"]


@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 130), (130, 5)])
def test_it_is_its_definition(queries, keys, width):
    q, k, v = (torch.randn(n, 3 * width) for n in (queries, keys, keys))
    assert relative(attend(q, Keys(k, v, 3)), definition(q, k, v, 3)) < 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
def test_queries_may_have_another_dtype(precision):
    """As where a block's keys stay within float16 and its tokens do not."""
    q, k, v = inputs(5, 70, 2, "random")
    mixed = attend(q.bfloat16(), Keys(k.half(), v.half(), 2, precision))
    assert mixed.dtype == torch.bfloat16
    assert relative(mixed, definition(q, k, v, 2)) < 0.05


@pytest.mark.parametrize("rows", [1, 7, 64, 99])
def test_queries_may_come_in_parts(rows):
    q, k, v = inputs(99, 50, 2)
    keys = Keys(k, v, 2)
    parts = torch.cat([attend(part, keys) for part in q.split(rows)])
    torch.testing.assert_close(parts, attend(q, keys), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_one_signature(name):
    assert inspect.signature(getattr(torch_attention, name)) == inspect.signature(getattr(triton_attention, name))


@pytest.mark.parametrize("kind", SPREAD)
@pytest.mark.parametrize("precision", QUICK)
def test_what_precisions_cost(precision, kind):
    bound = BOUNDS[precision][kind]
    for keys in (512, 4096):
        q, k, v = inputs(256, keys, 2, kind)
        assert relative(quick(torch_attention, q, k, v, precision), definition(q, k, v, 2)) < bound


def test_plans_know_the_errors():
    """What plans compare is the error on the hardest softmax here, neither less nor much more."""
    assert tuple(ATTENTION_ERRORS) == PRECISIONS and ATTENTION_ERRORS["exact"] == 0
    for precision in QUICK:
        errors = []
        for keys in (512, 4096):
            q, k, v = inputs(256, keys, 2, "peaked")
            errors.append(relative(quick(torch_attention, q, k, v, precision), definition(q, k, v, 2)))
        assert 0.85 * ATTENTION_ERRORS[precision] < max(errors) < ATTENTION_ERRORS[precision]


@pytest.mark.parametrize("precision", ["full-int8", "fp8"])
def test_codes_of_one_scale_for_all_keys_would_cost_more(monkeypatch, precision):
    """A block's own scale is what makes int8 accurate. Float8 has its exponent, and is no better for it."""
    q, k, v = inputs(64, 2048, 1, "peaked")
    keys, reference = quantized(torch_attention, k, v, precision), definition(q, k, v, 1)
    blocks = relative(torch_attention.attend(q, keys), reference)
    monkeypatch.setattr(torch_attention, "BLOCK", 2048)
    whole = relative(torch_attention.attend(q, keys), reference)
    assert whole > 1.5 * blocks if precision == "full-int8" else whole < 1.2 * blocks


def test_without_taking_the_mean_away_they_would_cost_more():
    q, k, v = inputs(256, 512, 2, "biased")
    codes = torch_attention._quantize(k, 1.0)
    result = torch_attention.attend(q, QuantizedKeys("int8", *codes, *torch_attention.quantize_values(v, "int8")))
    assert relative(result, definition(q, k, v, 2)) > 4 * INT8


@pytest.fixture
def rounded():
    """The interpreter rounds to float8 as cards do."""
    with rounded_as_on_a_card():
        yield


@interpreted
@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "heads"), [(1, 1, 1), (3, 64, 2), (130, 200, 1), (129, 130, 2)])
@pytest.mark.parametrize("precision", QUICK)
def test_the_kernel_is_its_twin(queries, keys, heads, dtype, precision):
    q, k, v = inputs(queries, keys, heads, "biased", dtype)
    expected = quick(torch_attention, q, k, v, precision)
    with guarded():
        result = quick(triton_attention, q, k, v, precision)
    assert result.dtype == dtype
    rounding = 8e-3 if dtype == torch.bfloat16 else 1e-3  # the interpreter cuts bfloat16 off
    # In 8 bits both round to the same codes, but for scores that sit between two.
    summing = 2e-3 if precision == "int8" else 5e-4
    assert relative(result, expected.double()) < rounding + summing


@interpreted
@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("precision", ["full-int8", "fp8"])
@pytest.mark.parametrize("where", [0, 100, 199])
def test_a_block_far_from_the_peak_neither_overflows_nor_hides_it(precision, where):
    """The scores of one key are larger by 600 than all others, in the first block, a later one or the masked end."""
    q, k, v = inputs(3, 200, 1)
    k[where] += 50 * q[0] / q[0].norm()
    q[0] *= 1600 / (q[0] @ k[where]).abs() * 128**0.5
    expected = quick(torch_attention, q, k, v, precision)
    result = quick(triton_attention, q, k, v, precision)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result[0], v[where], rtol=0.07, atol=0.02)


@interpreted
@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize(("precision", "bound"), [("int8", 2e-3), ("fp8", 0.05)])
def test_sums_in_float16_stay_within_it(monkeypatch, precision, bound):
    """As on GeForce cards, with weights that are all alike and values that would add up to more than it holds."""
    monkeypatch.setattr(triton_attention, "float16_sums_are_quick", lambda device: True)
    q, k, v = inputs(3, 200, 2)
    v = 4000 + v
    assert relative(quick(triton_attention, 0 * q, k, v, precision), definition(0 * q, k, v, 2)) < bound
    assert relative(quick(triton_attention, q, k, v, precision), definition(q, k, v, 2)) < bound


@pytest.mark.filterwarnings("error", "ignore:Conversion of an array")  # by old interpreters
@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("precision", QUICK)
def test_a_query_of_zeros_sees_all_keys_alike(module, precision):
    q, k, v = inputs(2, 70, 1)
    result = quick(module, torch.stack((0 * q[0], q[1])), k, v, precision)
    rounding = {"int8": 1e-3, "full-int8": 4e-3, "fp8": 0.02}[precision]
    torch.testing.assert_close(result[0], v.mean(0), rtol=1e-3, atol=rounding)


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("precision", QUICK)
@pytest.mark.parametrize("rows", [1, 64, 130])
def test_queries_may_come_in_parts_in_other_precisions_too(module, rows, precision):
    q, k, v = inputs(131, 70, 1)
    keys = quantized(module, k, v, precision)
    several = [part for part in q.split(rows)][-3:]
    parts = torch.cat([module.attend(part, keys) for part in several])
    torch.testing.assert_close(parts, module.attend(q, keys)[-len(parts) :], rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("precision", QUICK)
@pytest.mark.parametrize("keys", [1, 64, 77])
def test_prepared_keys_are_those_of_the_twin(precision, keys):
    _, k, v = inputs(1, keys, 2, "biased")
    with guarded():
        ours = quantized(triton_attention, k, v, precision)
    theirs = quantized(torch_attention, k, v, precision)
    assert int((ours.codes.int() - theirs.codes.int()).abs().max()) <= 1
    torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-4, atol=1e-6)
    assert ours.values.dtype == theirs.values.dtype
    assert torch.equal(ours.values.float(), theirs.values.float())
    assert torch.equal(ours.value_scales, theirs.value_scales)
    if precision == "full-int8":
        assert torch.equal(ours.block_sums, theirs.block_sums)


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("precision", QUICK)
def test_values_beyond_float16_stay_values(module, precision):
    q, k, v = inputs(8, 40, 2)
    v = v * 1e5
    v[:, 128:] *= 1e-5
    v[:, 7] = 0
    result = quick(module, q, k, v, precision)
    assert result.isfinite().all() and not result[:, 7].any()
    reference = definition(q, k, v, 2)
    for head in (slice(0, 128), slice(128, 256)):
        assert relative(result[:, head], reference[:, head]) < 1.1 * BOUNDS[precision]["peaked"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("precision", QUICK)
def test_what_is_no_number_is_not_hidden(module, precision):
    q, k, v = inputs(8, 40, 2)
    q[3, 5] = float("nan")
    result = quick(module, q, k, v, precision)
    assert not result[3, :128].isfinite().any()
    assert result[2].isfinite().all() and result[3, 128:].isfinite().all()
    q, k, v = inputs(8, 40, 2)
    v[11, 200] = float("inf")
    result = quick(module, q, k, v, precision)
    assert not result[:, 200].isfinite().any()
    assert result[:, :128].isfinite().all()


def in_a_room(k):
    room = KeyRoom(*k.shape, k.dtype, CPU)
    room.keys.copy_(k)
    return room


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("parts", [[200], [1, 62, 137], [128, 72], [190, 10]])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("precision", QUICK)
def test_codes_that_take_the_place_of_keys_are_the_same(monkeypatch, module, precision, parts):
    """Whether values are in memory, or come in parts that end within blocks."""
    monkeypatch.setattr(attention, "_kernels", lambda device: module)
    monkeypatch.setattr(attention, "_FIRST", 30)
    _, k, v = inputs(1, 200, 2, dtype=torch.bfloat16)
    expected = quantized(module, k, v, precision)
    largest = torch.stack([largest_values(part) for part in v.split(parts)]).amax(0)
    for values in (v.clone(), PassingValues(largest, lambda: iter(v.split(parts)))):
        keys = Keys(in_a_room(k), values, 2, precision)
        keys.prepare()
        for name in ("codes", "scales", "values", "value_scales", "block_sums"):
            ours, theirs = getattr(keys.quantized, name), getattr(expected, name)
            assert theirs is ours or torch.equal(ours.float(), theirs.float()), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_checked_shows_a_key_or_a_value_that_is_no_number(monkeypatch, module, precision, broken):
    monkeypatch.setattr(attention, "_kernels", lambda device: module)
    for wrong in (None, 1, 2):
        _, k, v = tensors = inputs(1, 70, 2, dtype=torch.bfloat16)
        if wrong is not None:
            tensors[wrong][69, 200] = broken
        keys = Keys(in_a_room(k), v, 2, precision)
        keys.prepare()
        assert all(tensor.isfinite().all() for tensor in keys.checked) == (wrong is None)


def test_keys_let_go_of_what_they_do_not_need():
    _, k, v = inputs(1, 40, 2)
    keys = Keys(k, v, 2, "int8")
    assert keys.plain[0] is k
    assert keys.quantized.codes.dtype == torch.int8
    assert keys.is_quantized
    with pytest.raises(AssertionError, match="freed"):
        _ = keys.plain


@interpreted
@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("precision", QUICK)
def test_a_measured_choice_is_followed(monkeypatch, tmp_path, precision):
    """As on a card that has both: the kernel that is said to be quickest is the one that runs, for every part."""
    q, k, v = inputs(20, 40, 2)
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path))
    monkeypatch.setattr(attention, "uses_triton", lambda device: True)
    for name in ("math", precision):
        monkeypatch.setattr(attention, "fastest", lambda device, key, candidates, name=name: name)
        keys = Keys(k, v, 2, precision)
        result = torch.cat([attend(part, keys) for part in q.split(7)])
        assert keys.is_quantized == (name != "math")
        assert relative(result, definition(q, k, v, 2)) < BOUNDS[precision]["peaked"]


@pytest.mark.parametrize(
    ("cudnn", "offered"), [(None, False), (91002, False), (91500, False), (91501, True), (92000, True)]
)
def test_cudnn_is_left_out_where_it_is_wrong(monkeypatch, cudnn, offered):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    q, k, v = (torch.empty(3, 128, device="meta") for _ in range(3))
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert ("cudnn" in ways(q, Keys(k, v, 1))) == offered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "heads"), [(1, 1, 1), (333, 4097, 4), (2048, 2048, 40)])
def test_every_way_on_a_gpu(queries, keys, heads, dtype):
    q, k, v = (t.cuda() for t in inputs(queries, keys, heads, "peaked", dtype))
    reference = definition(q, k, v, heads)
    for precision in QUICK if has_float8(q.device) else QUICK[:-1]:
        allowed = BOUNDS[precision]["peaked"] + 0.008
        for name in ways(q, Keys(k, v, heads, precision)):
            if name == "cudnn" and keys == 1:
                continue  # it refuses
            first, second = (ways(q, Keys(k, v, heads, precision))[name]() for _ in range(2))
            assert torch.equal(first, second)
            assert relative(first, reference) < allowed
        assert relative(attend(q, Keys(k, v, heads, precision)), reference) < allowed
