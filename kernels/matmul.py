"""Multiply activations with a weight that may be quantized, by the fastest backend on this device.

Exact: a few rows go through a kernel that decodes the blocks while it multiplies; for more rows the weight is decoded
first and multiplied by the vendor's GEMM, in x's dtype or in float16 with float16 accumulation if that is faster on
the card. Fast: weight and activations are multiplied as rotated int8.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels import elementwise, float16_sums
from skyrun.kernels.formats import FORMATS
from skyrun.kernels.machine.choice import bucket, fastest
from skyrun.kernels.machine.device import uses_triton
from skyrun.kernels.rotated import RotatedInt8
from skyrun.kernels.torch import int8 as torch_int8
from skyrun.kernels.weight import QuantizedWeight

FEW_ROWS = 64  # up to here the fused kernel can be faster than decoding first
_MEASURED_ROWS = 8192  # beyond, the time per row hardly changes
Backend = Callable[[slice], Tensor]  # multiplies these rows


def linear(
    x: Tensor | RotatedInt8,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer, y = x @ weight^T + bias -> [..., rows] in x's dtype; with a residual, residual + gate * y in its.

    Args:
        x: [..., cols]. Rows in rotated int8 need a weight that is `fast`; plain rows are rotated for such a weight.
        weight: [rows, cols].
        bias: [rows].
        gate: float32 [rows] for the residual form; None stands for ones.
        residual: [..., rows].
    """
    if isinstance(weight, QuantizedWeight) and weight.fast:
        rows = x if isinstance(x, RotatedInt8) else elementwise.quantize_rows(x)
        flat = RotatedInt8(rows.codes.reshape(-1, x.shape[-1]), rows.scales.reshape(-1), rows.dtype)
        y = _fast(flat, weight, bias, gate, None if residual is None else residual.reshape(-1, weight.shape[0]))
        return y.view(*x.shape[:-1], -1)
    assert isinstance(x, Tensor), "rotated rows need a fast weight"
    if isinstance(weight, QuantizedWeight):
        y = float16_sums.within_range(weight.name, lambda: _exact(x, weight, bias), lambda product: [product])
    else:
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if residual is None:
        return y
    out = y.view(residual.dtype) if y.dtype.itemsize == residual.dtype.itemsize else None  # the sum takes its memory
    return elementwise.add_gated(residual, y, gate, out)


def _exact(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    backends: dict[str, Backend] = {"decode": lambda part: _decoded(flat[part], weight, bias)}
    if x.device.type != "cpu" and x.dtype != torch.float32:
        if len(flat) > FEW_ROWS:
            if float16_sums.are_used(x.device):
                backends["decode, float16 sums"] = lambda part: float16_sums.multiply(flat[part], weight, bias)
        elif uses_triton(x.device):
            backends["fused"] = lambda part: _fused(flat[part], weight, bias)
    chosen = _choose(f"linear {weight.type}", len(flat), weight, x.dtype, x.device, backends)
    return backends[chosen](slice(None)).view(*x.shape[:-1], -1)


def _choose(
    what: str,
    rows: int,
    weight: QuantizedWeight,
    dtype: torch.dtype,
    device: torch.device,
    backends: Mapping[str, Backend],
) -> str:
    """The name of the fastest backend, measured on at most _MEASURED_ROWS rows."""
    out, cols = weight.shape
    size = f"{bucket(min(rows, _MEASURED_ROWS))}x{cols}x{out} {str(dtype).removeprefix('torch.')}"
    some = slice(0, _MEASURED_ROWS)
    return fastest(device, f"{what} {size}", {name: partial(multiply, some) for name, multiply in backends.items()})


def _decoded(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.dense(x.dtype), None if bias is None else bias.to(x.dtype))


def _fused(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    from skyrun.kernels.triton import few_rows as triton_few_rows

    return triton_few_rows.multiply(x, weight, bias)


def _fast(
    x: RotatedInt8, weight: QuantizedWeight, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    device = x.codes.device
    if not uses_triton(device):
        return torch_int8.multiply(x, torch_int8.encode_weight(weight), bias, gate, residual)
    from skyrun.kernels.triton import encode as triton_encode
    from skyrun.kernels.triton import int8 as triton_int8

    blocks = FORMATS[weight.type].block_size > 1
    encoded = triton_encode.encode_weight(weight) if blocks else elementwise.quantize_rows(weight.dense(x.dtype))

    def run(multiply: Callable[..., Tensor], part: slice) -> Tensor:
        rows = RotatedInt8(x.codes[part], x.scales[part], x.dtype)
        return multiply(rows, encoded, bias, gate, None if residual is None else residual[part])

    backends: dict[str, Backend] = {
        "triton": partial(run, triton_int8.multiply),
        "_int_mm": partial(run, torch_int8.multiply),
    }
    parts = ("gate",) * (gate is not None) + ("residual",) * (residual is not None)  # their tiles take another time
    chosen = _choose(" ".join(("int8", *parts)), len(x.codes), weight, x.dtype, device, backends)
    return backends[chosen](slice(None))
