"""Quantized keys and values, the input of attention in less than 16 bits, and the precisions that there are."""

from dataclasses import dataclass

import torch
from torch import Tensor

HEAD_DIM = 128  # of every Wan transformer, and the only one that the kernel supports
# Of attention, the most accurate first. Scores are computed in int8 by all but "exact"; probabilities and values are in
# float16 with "int8", in int8 with "full-int8", and in float8 (e4m3) with "fp8".
PRECISIONS = ("exact", "int8", "full-int8", "fp8")
BLOCK = 64  # keys whose probabilities in 8 bits share a scale, which makes the largest one the largest code
# The largest codes of probabilities and values. 64 products of the largest in float8 add up within float16: 64,512. Of
# probabilities in int8 the kernel takes 128 away, since they are not negative.
LARGEST = {"full-int8": (255.0, 127.0), "fp8": (448.0, 2.25)}
_LARGEST_VALUE = 512.0  # 64 of these, weighted by probabilities, add up without overflowing float16
_SMALLEST = 1e-30  # a channel of smaller values is as good as zero; scales for them would leave float32


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


class KeyRoom:
    """Memory of keys [M, D] in at least 16 bits, which their codes and their values in 8 bits may take over.

    The codes are written over its first bytes. Keys in 16 bits have as many again, for the values.
    """

    def __init__(self, count: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._count = count
        self._memory = torch.empty((whole_blocks(count), width), dtype=dtype, device=device)

    @property
    def keys(self) -> Tensor:
        """The keys [M, D], until codes are written."""
        return self._memory[: self._count]

    @property
    def codes(self) -> Tensor:
        """Their codes, int8 [M, D]. Those of a row lie no further back than the row itself."""
        return self._bytes(0, torch.int8).view(self._memory.shape)[: self._count]

    def values(self, dtype: torch.dtype) -> Tensor:
        """Values of an 8-bit dtype, a row for each channel: [D, M rounded up to whole blocks]."""
        return self._bytes(1, dtype).view(self._memory.shape[1], -1)

    def _bytes(self, part: int, dtype: torch.dtype) -> Tensor:
        size = self._memory.numel()
        return self._memory.view(torch.int8).flatten()[part * size : (part + 1) * size].view(dtype)


def whole_blocks(count: int) -> int:
    """A number of keys rounded up to whole blocks."""
    return -(-count // BLOCK) * BLOCK


def largest_values(v: Tensor) -> Tensor:
    """The largest magnitude of each channel of values [M, D], float32 [D]; not finite if one of them is not."""
    return torch.maximum(v.amax(0), -v.amin(0)).float()


def empty_values(
    largest: Tensor, count: int, precision: str, room: KeyRoom | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Memory for quantized values, their scales, and memory for sums of blocks, as `QuantizedKeys` has them.

    Args:
        largest: magnitude of each channel, float32 [D].
        count: how many values there are.
        precision: of PRECISIONS, but "exact".
        room: that of their keys, which values in 8 bits take over.
    """
    device, width = largest.device, len(largest)
    if precision == "int8":
        return torch.empty((count, width), dtype=torch.float16, device=device), _head_scales(largest), None
    kind = torch.int8 if precision == "full-int8" else torch.float8_e4m3fn
    whole = whole_blocks(count)
    values = torch.empty((width, whole), dtype=kind, device=device) if room is None else room.values(kind)
    blocks = (
        torch.empty((whole // BLOCK, width), dtype=torch.int32, device=device) if precision == "full-int8" else None
    )
    return values, _channel_scales(largest, precision), blocks


def _head_scales(largest: Tensor) -> Tensor:
    """Per head the power of two that scales its values to at most 512, or 1 if they are smaller; float32 [H]."""
    heads = largest.unflatten(0, (-1, HEAD_DIM)).amax(1)
    powers: Tensor = torch.log2(heads.clamp_min(_LARGEST_VALUE) / _LARGEST_VALUE).ceil()
    return torch.exp2(powers)


def _channel_scales(largest: Tensor, precision: str) -> Tensor:
    """Per channel what a code of 1 stands for, so that its largest value has the largest code; float32 [D]."""
    return largest.clamp_min(_SMALLEST) / LARGEST[precision][1]
