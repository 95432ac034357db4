"""Kernels beside their twins in torch and beside float64, at small shapes and at those of whole clips; and how fast."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from acceptance.step import Figure, Scale
from skyrun.kernels import linear
from skyrun.kernels.machine.failures import is_device_lost, is_out_of_memory
from skyrun.models.dit_header import HEAD_DIM
from skyrun.presets.attention import ATTENTION_ERRORS
from skyrun.tools.bench.checks import FAST_ERROR, ROUNDING, Check, check_kernels, relative_error
from skyrun.tools.bench.kernels import QUANTIZED, WAN_14B, Bench, attention_way, attention_ways
from skyrun.tools.bench.measurement import Clock
from skyrun.tools.bench.synthetic_weight import random_weight

_TALL = ("Q8_0", "Q6_K", "Q4_K")
_SAMPLED = 200  # rows that are computed again in float64, the last one among them
_TRIED, _MATH = 256, 10_000  # queries and keys that a backend is tried with; keys from which on scores are too many
_NOISE = 0.5  # of queries that are keys otherwise: each finds its key, and the softmax is peaked
# Of the time of a resident 16-bit weight, by rows; and how much faster int8 has to be from which rows on.
_EXACT = {512: 1.55, 2048: 1.15, 8192: 1.04, 32768: 1.01}
_FAST_FROM, _FAST = 8192, 1 / 1.15
_OF_A_COPY = {"Q8_0": 0.75, "Q4_K": 0.75, "Q5_K": 0.75}  # other types: less
_OF_A_COPY_ELSE = 0.60


@torch.inference_mode()
def kernels(scale: Scale) -> Iterator[Figure]:
    """Every type on few and on many rows, and products with as many rows as a clip of 720P has."""
    dims = scale.of(WAN_14B, replace(WAN_14B, dim=256, heads=2, ffn_dim=512))
    groups = defaultdict(list)
    for check in check_kernels(Bench(scale.device, QUANTIZED, dims=dims)):
        int8 = ", int8" if check.what.endswith("int8") else ""
        groups[check.what.partition(" x ")[0] + (int8 if " x " in check.what else "")].append(check)
    for what, checks in groups.items():
        worst = max(checks, key=_used)
        yield Figure(what, worst.error, "relative error", most=worst.allowed)
    rows = scale.of(126_000, 700)
    for type in _TALL:
        for out, cols in ((dims.ffn_dim, dims.dim), (dims.dim, dims.ffn_dim)):
            x = torch.randn(rows, cols, device=scale.device, dtype=scale.dtype)
            weight = random_weight(type, out, cols, scale.device)
            sampled = _sample(rows, scale)
            expected = F.linear(x[sampled].double(), weight.dense(torch.float32).double())
            for fast in (False, True):
                got = linear(x, replace(weight, fast=fast))[sampled]
                allowed = ROUNDING[scale.dtype] + (FAST_ERROR if fast else 0)
                name = f"{type} {rows}x{cols}x{out}" + ", int8" * fast
                yield Figure(name, relative_error(got, expected), "relative error", most=allowed)


def _used(check: Check) -> float:
    """The share of what is allowed."""
    return check.error / check.allowed if check.allowed else check.error


def _sample(rows: int, scale: Scale) -> Tensor:
    """Indexes of some rows, in order, the last one among them."""
    some = torch.randperm(rows - 1)[: _SAMPLED - 1]
    return torch.cat((some, torch.tensor([rows - 1]))).sort().values.to(scale.device)


@torch.inference_mode()
def attention(scale: Scale) -> Iterator[Figure]:
    """The error of every backend with a peaked and with a flat softmax, and its rate."""
    heads = scale.of(WAN_14B.heads, 2)
    for tokens in scale.of((32_768, 126_000), (700,)):
        k, v = (torch.randn(tokens, heads * HEAD_DIM, device=scale.device, dtype=scale.dtype) for _ in range(2))
        flat = torch.randn_like(k)
        peaked = k[torch.randperm(tokens, device=scale.device)] + _NOISE * flat
        sampled = _sample(tokens, scale)
        for kind, q in (("peaked", peaked), ("flat", flat)):
            expected = _exactly(q[sampled], k, v, heads)
            for name in _names(q, k, heads):
                error = relative_error(attention_way(name, q, k, v, heads)[sampled], expected)
                allowed = ROUNDING[scale.dtype] + ATTENTION_ERRORS.get(name, 0.0)
                yield Figure(f"{name}, {tokens}, {kind}", error, "relative error", most=allowed)
        yield from _rates_of_attention(scale, peaked, k, v, heads)


def _rates_of_attention(scale: Scale, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Iterator[Figure]:
    """The time includes preparing the keys, which a run does once for each block."""
    clock, tokens = Clock(scale.device), len(q)
    for name in _names(q, k, heads):
        seconds = clock.seconds(lambda name=name: attention_way(name, q, k, v, heads))
        rate = 4 * tokens * tokens * heads * HEAD_DIM / seconds / 1e12 if seconds else 0.0
        yield Figure(f"{name}, {tokens}", rate, "TFLOP/s", least=scale.on_card(1))


def _names(q: Tensor, k: Tensor, heads: int) -> list[str]:
    """The backends that can do it. "math" stores all scores, too many for a clip."""
    bench = Bench(q.device, dims=replace(WAN_14B, dim=heads * HEAD_DIM, heads=heads))
    found = [name for name in attention_ways(bench) if _runs(q, k, heads, name)]
    return [name for name in found if name != "math" or len(k) < _MATH]


def _runs(q: Tensor, k: Tensor, heads: int, name: str) -> bool:
    """Whether a backend takes this dtype and these heads here."""
    try:
        attention_way(name, q[:_TRIED], k[:_TRIED], k[:_TRIED], heads)
    except RuntimeError as error:
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        return False
    return True


def _exactly(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention in float64, head by head."""
    parts = []
    for queries, keys, values in zip(*(t.chunk(heads, 1) for t in (q, k, v)), strict=True):
        scores = queries.double() @ keys.double().T / HEAD_DIM**0.5
        parts.append(torch.softmax(scores, 1) @ values.double())
    return torch.cat(parts, 1)


@torch.inference_mode()
def rates(scale: Scale) -> Iterator[Figure]:
    """Products beside a resident 16-bit weight, and decoding beside a copy."""
    clock, dtype, device = Clock(scale.device), scale.dtype, scale.device
    out, cols = scale.of((WAN_14B.ffn_dim, WAN_14B.dim), (512, 256))
    for rows in scale.of(tuple(_EXACT), (64, 512)):
        x = torch.randn(rows, cols, device=device, dtype=dtype)
        resident = torch.randn(out, cols, device=device, dtype=dtype)
        base = clock.seconds(lambda: F.linear(x, resident)) or float("nan")  # noqa: B023
        yield Figure(f"resident x {rows}", 2 * rows * out * cols / base / 1e12, "TFLOP/s")
        for type in _TALL:
            weight = random_weight(type, out, cols, device)
            for fast in (False, True):
                bound = (_FAST if rows >= _FAST_FROM else None) if fast else _EXACT.get(rows)
                work = replace(weight, fast=fast)
                seconds = clock.seconds(lambda: linear(x, work)) or float("nan")  # noqa: B023
                name = f"{type} x {rows}" + ", int8" * fast
                yield Figure(name, seconds / base, "/ resident", most=scale.on_card(bound) if bound else None)
    source = torch.empty(scale.of(1 << 30, 1 << 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / (clock.seconds(lambda: target.copy_(source)) or float("nan"))
    yield Figure("copy", copy / 1e9, "GB/s")
    for type in QUANTIZED:
        weight = random_weight(type, out, cols, device)
        moved = weight.data.nbytes + out * cols * dtype.itemsize
        rate = moved / (clock.seconds(lambda: weight.dense(dtype)) or float("nan"))  # noqa: B023
        bound = _OF_A_COPY.get(type, _OF_A_COPY_ELSE)
        yield Figure(f"decode {type}", rate / copy, "/ copy", least=scale.on_card(bound))
