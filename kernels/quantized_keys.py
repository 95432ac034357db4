"""Quantized keys and values, the input of attention in less than 16 bits, and the precisions that there are."""

from dataclasses import dataclass

from torch import Tensor

HEAD_DIM = 128  # of every Wan transformer, and the only one that the kernel supports
# Of attention, the most accurate first. Scores are computed in int8 by all but "exact"; probabilities and values are in
# float16 with "int8", in int8 with "full-int8", and in float8 (e4m3) with "fp8".
PRECISIONS = ("exact", "int8", "full-int8", "fp8")
BLOCK = 64  # keys whose probabilities in 8 bits share a scale, which makes the largest one the largest code
# The largest codes of probabilities and values. 64 products of the largest in float8 add up within float16: 64,512. Of
# probabilities in int8 the kernel takes 128 away, since they are not negative.
LARGEST = {"full-int8": (255.0, 127.0), "fp8": (448.0, 2.25)}


def for_few_keys(precision: str) -> str:
    """The precision for keys of a text or an image beside one for many: with values in 16 bits, which takes no time.

    The rows after a text are all alike. So are their errors, which do not average out, and a few large values of the
    text make a channel's scale too coarse for all others.
    """
    return "int8" if precision in LARGEST else precision


@dataclass(frozen=True)
class QuantizedKeys:
    """M keys and values of H heads of dimension 128.

    codes: int8 [M, H * 128], the keys minus their mean over all tokens, which does not change the softmax.
    scales: float32 [H, M]. precision: of PRECISIONS.

    values, value_scales: with "int8" float16 [M, H * 128], divided by value_scales, float32 [H]. In 8 bits a row for
    each channel, [H * 128, M rounded up to whole blocks], zeros at the end, with value_scales float32 [H * 128].
    block_sums: int32 [blocks, H * 128], 128 times the sum of a block's values, with "full-int8" only.
    """

    precision: str
    codes: Tensor
    scales: Tensor
    values: Tensor
    value_scales: Tensor
    block_sums: Tensor | None = None
