"""Random quantized weights to measure with: they take as many bytes and as much work as real ones."""

import torch
from torch import Tensor

from skyrun.kernels.formats import block_format
from skyrun.kernels.machine.device import uses_triton
from skyrun.kernels.planes import needs_planes, to_planes
from skyrun.kernels.weight import QuantizedWeight

# Byte offsets of the float16 scales in a block. All other bytes may have any value.
_SCALES = {
    **dict.fromkeys(("Q8_0", "Q5_0", "Q4_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q5_K", "Q4_K", "Q5_1", "Q4_1"), (0, 2)),
    **{"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)},
}
_SCALE = 2.0**-14  # as large as the scales of real weights


def random_blocks(type: str, rows: int, cols: int, generator: torch.Generator | None = None) -> Tensor:
    """Valid random blocks of a quantized type, uint8 [rows, row_bytes], with scales between 2^-15 and 2^-14."""
    format = block_format(type)
    blocks = torch.randint(0, 256, (rows, format.row_bytes(cols)), dtype=torch.uint8, generator=generator)
    by_block = blocks.view(-1, format.block_bytes)
    for at in _SCALES[type]:
        scales = (torch.rand(len(by_block), generator=generator) / 2 + 0.5) * _SCALE
        by_block[:, at : at + 2] = scales.half().view(torch.uint8).view(-1, 2)
    return blocks


def random_weight(type: str, rows: int, cols: int, device: torch.device, *, fast: bool = False) -> QuantizedWeight:
    """A weight of random blocks on the device, in the layout that the device's kernels read."""
    blocks = random_blocks(type, rows, cols)
    planar = uses_triton(device) and needs_planes(type)
    return QuantizedWeight((to_planes(blocks, type) if planar else blocks).to(device), type, planar, fast)
