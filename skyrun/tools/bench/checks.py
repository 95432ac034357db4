"""Check the kernels on this device against reference computations, before they are timed."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels import dequantize, elementwise, linear
from skyrun.kernels.matmul import FEW_ROWS
from skyrun.kernels.torch import decode as torch_decode
from skyrun.kernels.torch import elementwise as torch_elementwise
from skyrun.kernels.torch import int8 as torch_int8
from skyrun.kernels.torch.attention import read_keys
from skyrun.kernels.torch.int8 import rotate
from skyrun.models.dit_header import HEAD_DIM
from skyrun.presets.attention import ATTENTION_ERRORS
from skyrun.tools.bench.kernels import (
    Bench,
    attention_way,
    attention_ways,
    drawn_lists,
    list_precisions,
    list_way,
)
from skyrun.tools.bench.synthetic_weight import random_blocks, random_weight

_ROWS, _COLS = 205, 1024  # of weights; not multiples of a tile
FAST_ERROR = 0.016  # relative error that int8 may add to a linear layer
# Relative error of a matmul against float64, by the activations' dtype, with sums in float16 too.
ROUNDING = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Check:
    """The relative error of a kernel against its reference, and the largest error that is allowed."""

    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def relative_error(result: Tensor, reference: Tensor) -> float:
    """|result - reference| / |reference|, Frobenius, in float64; infinite if a value is NaN."""
    result, reference = result.double().cpu(), reference.double().cpu()
    error = float((result - reference).norm() / reference.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


@torch.inference_mode()
def check_kernels(bench: Bench) -> Iterator[Check]:
    """Check everything that is timed, and the elementwise kernels, on small shapes."""
    for type in bench.types:
        yield _decode(bench, type)
        yield from _linear(bench, type)
    yield from _attention(bench)
    yield from _elementwise(bench)


def _decode(bench: Bench, type: str) -> Check:
    blocks = random_blocks(type, _ROWS, _COLS)
    worst = (dequantize(blocks.to(bench.device), type).cpu() - torch_decode.dequantize(blocks, type)).abs().max()
    return Check(f"decode {type}", float(worst), 0.0)


def _linear(bench: Bench, type: str) -> Iterator[Check]:
    weight = random_weight(type, _ROWS, _COLS, bench.device)
    dense = weight.dense(torch.float32).double().cpu()
    for rows in (1, FEW_ROWS, 3 * FEW_ROWS + 1):
        x = bench.random(rows, _COLS)
        reference = F.linear(x.double().cpu(), dense)
        allowed = ROUNDING[bench.dtype]
        yield Check(f"linear {type} x {rows}", relative_error(linear(x, weight), reference), allowed)
    fast = relative_error(linear(x, replace(weight, fast=True)), reference)
    yield Check(f"linear {type} x {rows}, int8", fast, FAST_ERROR + allowed)


def _attention(bench: Bench) -> Iterator[Check]:
    """Check with a peaked softmax: queries are noisy keys."""
    heads, tokens, keys = 2, 333, 1111
    k, v = torch.randn(keys, heads * HEAD_DIM), torch.randn(keys, heads * HEAD_DIM)
    q = k[torch.randint(0, keys, (tokens,))] + 0.5 * torch.randn(tokens, heads * HEAD_DIM)
    q, k, v = (t.to(bench.device, bench.dtype) for t in (q, k, v))
    wide = [t.double().cpu().unflatten(1, (heads, -1)).transpose(0, 1) for t in (q, k, v)]
    reference = F.scaled_dot_product_attention(wide[0], wide[1], wide[2]).transpose(0, 1).flatten(1)
    for name in attention_ways(bench):
        allowed = ATTENTION_ERRORS.get(name, 0.0) + ROUNDING[bench.dtype]
        yield Check(f"attention, {name}", relative_error(attention_way(name, q, k, v, heads), reference), allowed)
    chosen = drawn_lists(tokens, keys, heads, 0.3, bench.device)
    read = read_keys(chosen, range(tokens)).cpu()
    reference = F.scaled_dot_product_attention(wide[0], wide[1], wide[2], read).transpose(0, 1).flatten(1)
    for name in list_precisions(bench):
        allowed = ATTENTION_ERRORS[name] + ROUNDING[bench.dtype]
        error = relative_error(list_way(name, q, k, v, heads, chosen), reference)
        yield Check(f"attention to chosen tiles, {name}", error, allowed)


def _elementwise(bench: Bench) -> Iterator[Check]:
    """Check against the torch twins, on the CPU in float32."""
    x, y = bench.random(_ROWS, _COLS), bench.random(_ROWS, _COLS)
    gain, shift = torch.randn(_COLS, device=bench.device), torch.randn(_COLS, device=bench.device)
    angles = torch.rand(_ROWS, HEAD_DIM // 2, device=bench.device)
    rope = (angles.cos(), angles.sin())
    wide, other, gain_, shift_ = x.float().cpu(), y.float().cpu(), gain.cpu(), shift.cpu()
    rope_ = (rope[0].cpu(), rope[1].cpu())
    twin = torch_elementwise
    pairs = {
        "layer norm": (elementwise.layer_norm(x, gain, shift, 1e-6), twin.layer_norm(wide, gain_, shift_, 1e-6)),
        "RMS norm and rotary embedding": (
            elementwise.rms_norm(x, gain, 1e-6, rope),
            twin.rms_norm(wide, gain_, 1e-6, rope_),
        ),
        "gated sum": (elementwise.add_gated(x, y, gain), twin.add_gated(wide, other, gain_)),
        "GELU": (elementwise.gelu(x), twin.gelu(wide)),
    }
    for what, (result, reference) in pairs.items():
        assert isinstance(result, Tensor) and isinstance(reference, Tensor)
        yield Check(what, relative_error(result, reference), ROUNDING[bench.dtype])
    rotated = elementwise.quantize_rows(x)
    restored = rotate(rotated.codes.float() * rotated.scales.unsqueeze(-1))
    expected = torch_int8.quantize_rows(wide)
    allowed = relative_error(rotate(expected.codes.float() * expected.scales.unsqueeze(-1)), wide)
    yield Check("rows in rotated int8", relative_error(restored, wide), 1.1 * allowed)
