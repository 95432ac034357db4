"""Multiply activations with a weight that may still be in block form: one name, and the quickest way behind it.

Exact: a few rows are multiplied while the blocks are decoded; more rows are worth a decoded copy and the vendor's
product, in bfloat16 or, where a card is quicker so, in float16 with sums in float16. Fast: weight and activations as
rotated int8.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels import elementwise, float16_sums, torch_int8
from skyrun.kernels.choice import bucket, fastest, seconds
from skyrun.kernels.device import uses_triton
from skyrun.kernels.formats import FORMATS
from skyrun.kernels.rotated import RotatedInt8
from skyrun.kernels.synthetic import random_weight
from skyrun.kernels.weight import QuantizedWeight

FEW_ROWS = 64  # up to here decoding while multiplying can pay
_MEASURED_ROWS = 8192  # rates hardly change beyond
Way = Callable[[slice], Tensor]  # of multiplying: for these rows


def linear(
    x: Tensor | RotatedInt8,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [..., cols] times weight [rows, cols] transposed, plus bias [rows] -> [..., rows], in x's dtype.

    With a residual [..., rows] the result is residual + gate * product; gate float32 [rows], or None for one. Rows in
    rotated int8 need a weight that is `fast`; such a weight rotates plain rows itself.
    """
    if isinstance(weight, QuantizedWeight) and weight.fast:
        rows = x if isinstance(x, RotatedInt8) else elementwise.quantize_rows(x)
        flat = RotatedInt8(rows.codes.reshape(-1, x.shape[-1]), rows.scales.reshape(-1), rows.dtype)
        product = _fast(flat, weight, bias, gate, None if residual is None else residual.reshape(-1, weight.shape[0]))
        return product.view(*x.shape[:-1], -1)
    assert isinstance(x, Tensor), "rotated rows are for fast weights"
    if isinstance(weight, QuantizedWeight):
        product = float16_sums.within_range(_exact, x, weight, bias)
    else:
        product = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return product if residual is None else elementwise.add_gated(residual, product, gate)


def _exact(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    ways: dict[str, Way] = {"decode": lambda part: _decoded(flat[part], weight, bias)}
    if x.device.type != "cpu" and x.dtype != torch.float32:
        if len(flat) > FEW_ROWS:
            if not float16_sums.may_overflow(weight):
                ways["decode, float16 sums"] = lambda part: float16_sums.multiply(flat[part], weight, bias)
        elif uses_triton(x.device):
            ways["fused"] = lambda part: _fused(flat[part], weight, bias)
    way = _choose(f"linear {weight.type}", len(flat), weight, x.dtype, x.device, ways)
    return ways[way](slice(None)).view(*x.shape[:-1], -1)


def _choose(
    what: str, rows: int, weight: QuantizedWeight, dtype: torch.dtype, device: torch.device, ways: Mapping[str, Way]
) -> str:
    """The quickest way, measured on no more rows than tell."""
    out, cols = weight.shape
    size = f"{bucket(min(rows, _MEASURED_ROWS))}x{cols}x{out} {str(dtype).removeprefix('torch.')}"
    some = slice(0, _MEASURED_ROWS)
    return fastest(device, f"{what} {size}", {name: partial(way, some) for name, way in ways.items()})


def _decoded(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.dense(x.dtype), None if bias is None else bias.to(x.dtype))


def _fused(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    from skyrun.kernels import triton_few_rows

    return triton_few_rows.multiply(x, weight, bias)


def _fast(
    x: RotatedInt8, weight: QuantizedWeight, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    device = x.codes.device
    if not uses_triton(device):
        return torch_int8.multiply(x, torch_int8.encode_weight(weight), bias, gate, residual)
    from skyrun.kernels import triton_encode, triton_int8

    blocks = FORMATS[weight.type].block_size > 1
    encoded = triton_encode.encode_weight(weight) if blocks else elementwise.quantize_rows(weight.dense(x.dtype))

    def way(multiply: Callable[..., Tensor], part: slice) -> Tensor:
        rows = RotatedInt8(x.codes[part], x.scales[part], x.dtype)
        return multiply(rows, encoded, bias, gate, None if residual is None else residual[part])

    ways: dict[str, Way] = {
        "triton": partial(way, triton_int8.multiply),
        "_int_mm": partial(way, torch_int8.multiply),
    }
    return ways[_choose("int8", len(x.codes), weight, x.dtype, device, ways)](slice(None))


def fast_gain(device: torch.device, rows: int, cols: int) -> float:
    """How many times quicker than exact products fast ones are here, at most 8192 rows of `cols`; 0 without Triton."""
    if not uses_triton(device) or cols % FORMATS["Q4_K"].block_size:
        return 0.0
    rows = min(rows, _MEASURED_ROWS)
    x = torch.randn(rows, cols, dtype=torch.bfloat16, device=device)
    exact, fast = (random_weight("Q4_K", cols, cols, device, fast=fast) for fast in (False, True))
    key = f"gain {bucket(rows)}x{cols}"
    taken = seconds(device, key, {"exact": lambda: linear(x, exact), "fast": lambda: linear(x, fast)})
    return taken["exact"] / taken["fast"] if len(taken) == 2 else 0.0
