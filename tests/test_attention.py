"""Attention: every way against its definition in float64, queries in parts, int8 scores on hard softmaxes."""

import inspect
from importlib.metadata import version

import pytest
import torch
from cubins import ARCHS, SHARED_LIMIT, Variant, compile_all
from guards import guarded
from torch.nn import functional as F

from skyrun.kernels import attention, torch_attention, triton_attention
from skyrun.kernels.attention import Keys, attend, ways
from skyrun.kernels.quantized_keys import QuantizedKeys

CPU = torch.device("cpu")
# Triton 3.6's interpreter cannot loop up to an argument with NumPy 2.4.
interpreted = pytest.mark.skipif(
    version("triton") < "3.7" and version("numpy") >= "2.4", reason="Triton 3.6 interprets no such loops with NumPy 2.4"
)
INT8 = 0.02  # relative error on a peaked softmax
NAMES = ("quantize_keys", "quantize_values", "attend")


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


def int8(module, q, k, v):
    return module.attend(q, QuantizedKeys(*module.quantize_keys(k), *module.quantize_values(v)))


def test_on_a_cpu_it_is_torchs_own_and_with_int8_scores_the_twin():
    q, k, v = inputs(7, 9, 2)
    split = [t.unflatten(1, (2, -1)).transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*split).squeeze(0).transpose(0, 1).flatten(1)
    assert torch.equal(attend(q, Keys(k, v, 2)), expected)
    keys = QuantizedKeys(*torch_attention.quantize_keys(k), *torch_attention.quantize_values(v))
    rounded = Keys(k, v, 2, fast=True)
    for part in (slice(0, 4), slice(4, 7)):
        assert torch.equal(attend(q[part], rounded), torch_attention.attend(q[part], keys))
    assert list(ways(q, Keys(k, v, 2, fast=True))) == ["math"]


@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 130), (130, 5)])
def test_it_is_its_definition(queries, keys, width):
    q, k, v = (torch.randn(n, 3 * width) for n in (queries, keys, keys))
    assert relative(attend(q, Keys(k, v, 3)), definition(q, k, v, 3)) < 1e-6


@pytest.mark.parametrize("rows", [1, 7, 64, 99])
def test_queries_may_come_in_parts(rows):
    q, k, v = inputs(99, 50, 2)
    keys = Keys(k, v, 2)
    parts = torch.cat([attend(part, keys) for part in q.split(rows)])
    torch.testing.assert_close(parts, attend(q, keys), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_one_signature(name):
    assert inspect.signature(getattr(torch_attention, name)) == inspect.signature(getattr(triton_attention, name))


BOUNDS = [("flat", 0.002), ("random", 0.012), ("found", 0.012), ("peaked", INT8), ("biased", INT8)]


@pytest.mark.parametrize(("kind", "bound"), BOUNDS)
@pytest.mark.parametrize("keys", [512, 4096])
def test_int8_scores_cost_little(kind, keys, bound):
    q, k, v = inputs(256, keys, 2, kind)
    assert relative(int8(torch_attention, q, k, v), definition(q, k, v, 2)) < bound


def test_without_taking_the_mean_away_they_would_cost_more():
    q, k, v = inputs(256, 512, 2, "biased")
    codes = torch_attention._quantize(k, 1.0)
    result = torch_attention.attend(q, QuantizedKeys(*codes, *torch_attention.quantize_values(v)))
    assert relative(result, definition(q, k, v, 2)) > 4 * INT8


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "heads"), [(1, 1, 1), (3, 64, 2), (130, 200, 1), (129, 130, 2)])
def test_the_kernel_is_its_twin(queries, keys, heads, dtype):
    q, k, v = inputs(queries, keys, heads, "biased", dtype)
    expected = int8(torch_attention, q, k, v)
    with guarded():
        result = int8(triton_attention, q, k, v)
    assert result.dtype == dtype
    rounding = 8e-3 if dtype == torch.bfloat16 else 1e-3  # the interpreter cuts bfloat16 off
    assert relative(result, expected.double()) < rounding + 2e-3


@interpreted
def test_sums_in_float16_stay_within_it(monkeypatch):
    """As on GeForce cards, with weights that are all alike and values that would add up to more than it holds."""
    monkeypatch.setattr(triton_attention, "float16_sums_are_quick", lambda device: True)
    q, k, v = inputs(3, 200, 2)
    v = 4000 + v
    assert relative(int8(triton_attention, 0 * q, k, v), definition(0 * q, k, v, 2)) < 2e-3
    assert relative(int8(triton_attention, q, k, v), definition(q, k, v, 2)) < 2e-3


@pytest.mark.filterwarnings("error", "ignore:Conversion of an array")  # by old interpreters
@pytest.mark.parametrize("module", [torch_attention, pytest.param(triton_attention, marks=interpreted)])
def test_a_query_of_zeros_sees_all_keys_alike(module):
    q, k, v = inputs(2, 70, 1)
    result = int8(module, torch.stack((0 * q[0], q[1])), k, v)
    torch.testing.assert_close(result[0], v.mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("module", [torch_attention, pytest.param(triton_attention, marks=interpreted)])
@pytest.mark.parametrize("rows", [1, 64, 130])
def test_queries_may_come_in_parts_with_int8_scores_too(module, rows):
    q, k, v = inputs(131, 70, 1)
    keys = QuantizedKeys(*module.quantize_keys(k), *module.quantize_values(v))
    several = [part for part in q.split(rows)][-3:]
    parts = torch.cat([module.attend(part, keys) for part in several])
    torch.testing.assert_close(parts, module.attend(q, keys)[-len(parts) :], rtol=1e-5, atol=1e-6)


def test_prepared_keys_are_those_of_the_twin():
    _, k, v = inputs(1, 77, 2, "biased")
    for name, given in (("quantize_keys", k), ("quantize_values", v)):
        for ours, theirs in zip(*(getattr(m, name)(given) for m in (triton_attention, torch_attention)), strict=True):
            if ours.dtype == torch.int8:
                assert int((ours.int() - theirs.int()).abs().max()) <= 1
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("module", [torch_attention, pytest.param(triton_attention, marks=interpreted)])
def test_values_beyond_float16_stay_values(module):
    q, k, v = inputs(8, 40, 2)
    v = v * 1e5
    v[:, 128:] *= 1e-5
    scales = module.quantize_values(v)[1]
    assert scales[0] > 1 and scales[1] == 1
    result = int8(module, q, k, v)
    assert result.isfinite().all()
    assert relative(result, definition(q, k, v, 2)) < INT8


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("module", [torch_attention, pytest.param(triton_attention, marks=interpreted)])
def test_what_is_no_number_is_not_hidden(module):
    q, k, v = inputs(8, 40, 2)
    q[3, 5] = float("nan")
    result = int8(module, q, k, v)
    assert not result[3, :128].isfinite().any()
    assert result[2].isfinite().all() and result[3, 128:].isfinite().all()


def test_keys_let_go_of_what_they_do_not_need():
    _, k, v = inputs(1, 40, 2)
    keys = Keys(k, v, 2, fast=True)
    assert keys.plain[0] is k
    assert keys.quantized.codes.dtype == torch.int8
    assert keys.is_quantized
    with pytest.raises(AssertionError, match="freed"):
        _ = keys.plain


@interpreted
def test_a_measured_choice_is_followed(monkeypatch, tmp_path):
    """As on a card that has both: the kernel that is said to be quickest is the one that runs, for every part."""
    q, k, v = inputs(20, 40, 2)
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path))
    monkeypatch.setattr(attention, "uses_triton", lambda device: True)
    for name in ("math", "int8"):
        monkeypatch.setattr(attention, "fastest", lambda device, key, candidates, name=name: name)
        keys = Keys(k, v, 2, fast=True)
        result = torch.cat([attend(part, keys) for part in q.split(7)])
        assert keys.is_quantized == (name == "int8")
        assert relative(result, definition(q, k, v, 2)) < INT8


@pytest.mark.parametrize(
    ("cudnn", "offered"), [(None, False), (91002, False), (91500, False), (91501, True), (92000, True)]
)
def test_cudnn_is_left_out_where_it_is_wrong(monkeypatch, cudnn, offered):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    q, k, v = (torch.empty(3, 128, device="meta") for _ in range(3))
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert ("cudnn" in ways(q, Keys(k, v, 1))) == offered


TENSORS = {"q": "*i8", "q_scales": "*fp32", "k": "*i8", "k_scales": "*fp32", "v": "*fp16", "v_scales": "*fp32"}
SIZES = {"out": "*bf16", "L": "i32", "M": "i32"}
TILE = {"HEADS": 40, "QUERIES": triton_attention.QUERIES, "KEYS": triton_attention.KEYS}
ROWS = {"HEADS": 40, "ROWS": triton_attention.ROWS}
MODULE = "skyrun.kernels.triton_attention"


def attend_variant(name, float16_sums, archs):
    return Variant(
        name,
        f"{MODULE}:attend_kernel",
        TENSORS | SIZES,
        TILE | {"FLOAT16_SUMS": float16_sums},
        warps=triton_attention.WARPS,
        stages=triton_attention.STAGES,
        unaligned=("L", "M"),
        archs=archs,
    )


VARIANTS = [
    attend_variant("attend", False, ARCHS),
    attend_variant("attend, float16 sums", True, (86, 89, 120)),
    Variant(
        "quantize",
        f"{MODULE}:quantize_kernel",
        {"x": "*bf16", "mean": "*fp32", "codes": "*i8", "scales": "*fp32", "count": "i32", "factor": "fp32"},
        ROWS,
        warps=triton_attention.ROW_WARPS,
        unaligned=("count",),
    ),
    Variant(
        "values",
        f"{MODULE}:values_kernel",
        {"v": "*bf16", "scales": "*fp32", "out": "*fp16", "count": "i32"},
        ROWS,
        warps=triton_attention.ROW_WARPS,
        unaligned=("count",),
    ),
]


@pytest.fixture(scope="module")
def cubins():
    return compile_all(VARIANTS)


@pytest.mark.parametrize(("name", "arch"), [(one.name, arch) for one in VARIANTS for arch in one.archs])
def test_cubin(cubins, name, arch):
    cubin = cubins[name, arch]
    assert cubin.stack == 0
    assert cubin.shared <= SHARED_LIMIT[arch]
    assert cubin.count("STG.E.128")
    if name.startswith("attend"):
        scores, values = ("IGMMA", "HGMMA") if arch == 90 else ("IMMA", "HMMA")
        assert cubin.count(scores) and cubin.count(values)
        # The start, the end, and a step of 64 keys twice, whole and masked: 32 scores of each thread.
        assert cubin.count("") - cubin.count(scores) - cubin.count(values) < 1850
    else:
        assert cubin.per_element(triton_attention.ROWS * 128) < 18


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "heads"), [(1, 1, 1), (333, 4097, 4), (2048, 2048, 40)])
def test_every_way_on_a_gpu(queries, keys, heads, dtype):
    q, k, v = (t.cuda() for t in inputs(queries, keys, heads, "peaked", dtype))
    reference = definition(q, k, v, heads)
    for name in ways(q, Keys(k, v, heads, fast=True)):
        if name == "cudnn" and keys == 1:
            continue  # it refuses
        first, second = (ways(q, Keys(k, v, heads, fast=True))[name]() for _ in range(2))
        assert torch.equal(first, second)
        assert relative(first, reference) < INT8 + 0.008
    assert relative(attend(q, Keys(k, v, heads, fast=True)), reference) < INT8 + 0.008
