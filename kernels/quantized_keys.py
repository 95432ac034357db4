"""Keys and values as attention with int8 scores reads them."""

from dataclasses import dataclass

from torch import Tensor

HEAD_DIM = 128  # of every Wan transformer; the only one that there is a kernel for


@dataclass(frozen=True)
class QuantizedKeys:
    """M keys and values of H heads, 128 numbers each.

    codes: int8 [M, H * 128], the keys less their mean over all tokens, which no softmax sees. scales: float32 [H, M].
    values: float16 [M, H * 128], divided by value_scales, float32 [H].
    """

    codes: Tensor
    scales: Tensor
    values: Tensor
    value_scales: Tensor
