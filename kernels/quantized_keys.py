"""Quantized keys and values, the input of attention with int8 scores."""

from dataclasses import dataclass

from torch import Tensor

HEAD_DIM = 128  # of every Wan transformer, and the only one that the kernel supports


@dataclass(frozen=True)
class QuantizedKeys:
    """M keys and values of H heads of dimension 128.

    codes: int8 [M, H * 128], the keys minus their mean over all tokens, which does not change the softmax.
    scales: float32 [H, M]. values: float16 [M, H * 128], divided by value_scales, float32 [H].
    """

    codes: Tensor
    scales: Tensor
    values: Tensor
    value_scales: Tensor
