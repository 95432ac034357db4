"""Encode weights to block bytes. Each type has an encoder and a line in the table ENCODERS."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from skyrun.kernels import block_format
from skyrun.kernels.errors import SkyrunError
from skyrun.quant.encoders.affine import (
    encode_q2_k,
    encode_q4_1,
    encode_q4_1_plain,
    encode_q4_k,
    encode_q5_1,
    encode_q5_1_plain,
    encode_q5_k,
)
from skyrun.quant.encoders.iq4 import IQ4_NL, IQ4_XS
from skyrun.quant.encoders.plain import encode_q4_0_plain, encode_q5_0_plain, encode_q8_0
from skyrun.quant.encoders.symmetric import Q3_K, Q4_0, Q5_0, Q6_K, encode_symmetric

# Version of the bytes that encoders write and that readers decode from sources. An interrupted conversion continues
# only with the version that began it. Raise it whenever the test of the encoders' bytes has to be changed.
ENCODER_VERSION = 2

# Blocks float32 [n, block_size] and importance [k, block_size] or None -> uint8 [n, block_bytes]. Block i has the
# importance of row i % k, which is positive and at most 1.
Encode = Callable[[Tensor, Tensor | None], Tensor]


class Encoder(NamedTuple):
    """How a type is encoded."""

    encode: Encode
    largest: float  # magnitude up to which its scales, or its values, are finite
    plain: Encode | None = None  # ggml's rounding without a search, byte for byte; None if ggml always searches


def _bytes(x: Tensor) -> Tensor:
    """The bytes of any tensor [n, k]: uint8 [n, k * itemsize]."""
    return x.contiguous().view(torch.uint8)


_HALF = torch.finfo(torch.float16).max
ENCODERS = {
    "F32": Encoder(lambda x, _: _bytes(x), torch.finfo(torch.float32).max, lambda x, _: _bytes(x)),
    "F16": Encoder(lambda x, _: _bytes(x.half()), _HALF, lambda x, _: _bytes(x.half())),
    "BF16": Encoder(
        lambda x, _: _bytes(x.bfloat16()), torch.finfo(torch.bfloat16).max, lambda x, _: _bytes(x.bfloat16())
    ),
    "Q8_0": Encoder(encode_q8_0, 127 * _HALF, encode_q8_0),
    "Q6_K": Encoder(partial(encode_symmetric, Q6_K), 32 * 127 * _HALF),
    "Q5_K": Encoder(encode_q5_k, 63 * _HALF),
    "Q4_K": Encoder(encode_q4_k, 63 * _HALF),
    "Q3_K": Encoder(partial(encode_symmetric, Q3_K), 4 * 31 * _HALF),
    "Q2_K": Encoder(encode_q2_k, 15 * _HALF),
    "Q5_1": Encoder(encode_q5_1, _HALF, encode_q5_1_plain),
    "Q5_0": Encoder(partial(encode_symmetric, Q5_0), 16 * _HALF, encode_q5_0_plain),
    "Q4_1": Encoder(encode_q4_1, _HALF, encode_q4_1_plain),
    "Q4_0": Encoder(partial(encode_symmetric, Q4_0), 8 * _HALF, encode_q4_0_plain),
    "IQ4_NL": Encoder(partial(encode_symmetric, IQ4_NL), 113 * _HALF),
    "IQ4_XS": Encoder(partial(encode_symmetric, IQ4_XS), 113 * 31 * _HALF),
}


def quantize(x: Tensor, type: str, importance: Tensor | None = None, *, search: bool = True) -> Tensor:
    """Encode rows of weights -> uint8 [rows, row_bytes] on x's device.

    Args:
        x: [rows, cols], of any floating dtype.
        type: the GGUF type.
        importance: float32 [cols], the mean square of each input channel. The error of a weight is weighted by it;
            types whose format leaves no choice ignore it.
        search: False selects ggml's plain rounding, which not all types have.

    Raises SkyrunError for an unknown type, a row that is not a whole number of blocks, and weights that are not finite
    or too large for the type.
    """
    format = block_format(type)
    if x.ndim != 2:
        raise SkyrunError(f"weights of shape {list(x.shape)}, expected [rows, cols]", "reshape them to a matrix")
    x = x.detach().float()
    rows, cols = x.shape
    row_bytes = format.row_bytes(cols)
    encoder = ENCODERS[type]
    encode = encoder.encode if search else encoder.plain
    if encode is None:
        raise SkyrunError(f"{type} has no plain rounding", "leave out search=False")
    low, high = (float(end) for end in x.aminmax()) if x.numel() else (0.0, 0.0)
    top = max(-low, high)
    if not top < torch.inf:  # NaN too
        raise SkyrunError(
            f"{int((~torch.isfinite(x)).sum())} weights are NaN or infinite", "download or make the source again"
        )
    if top > encoder.largest:
        raise SkyrunError(f"{type} holds up to {encoder.largest:g}, got a weight of {top:g}", "use BF16 or F32")
    blocks = x.reshape(-1, format.block_size)
    weights = None if importance is None else _relative(importance, cols)
    if weights is not None:
        weights = weights.to(x.device).view(-1, format.block_size)
    return encode(blocks, weights).view(rows, row_bytes)


def _relative(importance: Tensor, cols: int) -> Tensor | None:
    """Importance divided by its largest value; None if it is all zero.

    A group with no importance at all would have no defined fit, so there is a floor far below the other values.
    """
    if importance.shape != (cols,) or not torch.isfinite(importance).all() or (importance < 0).any():
        got = list(importance.shape) if importance.shape != (cols,) else "negative, NaN or infinite values"
        raise SkyrunError(f"an importance of {got}, expected {cols} values of at least 0", "collect it again")
    top = importance.max()
    return (importance.float() / top).clamp_min(1e-6) if top > 0 else None
