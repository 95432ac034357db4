"""IQ4_NL and IQ4_XS: the search of the symmetric types with codes that stand for sixteen unevenly spaced numbers."""

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from skyrun.kernels.torch_decode import IQ4_VALUES
from skyrun.quant.encode_symmetric import Integers, Symmetric
from skyrun.quant.pack_symmetric import pack_iq4_xs, pack_q4_0
from skyrun.quant.tiles import Workspace


@lru_cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For every half step from the lowest number to the highest, the nearest number and its code; minus twice the
    lowest number, which leads from numbers to half steps.

    Midpoints between neighbours are whole or half, so that all of a half step is nearest to the same number.
    """
    low, high = IQ4_VALUES[0], IQ4_VALUES[-1]
    steps = torch.arange(2 * low, 2 * high + 1)
    code = torch.bucketize(steps, torch.tensor([a + b for a, b in pairwise(IQ4_VALUES)]), right=True)
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32)[code]
    return values.to(device), code.to(device, torch.uint8), torch.tensor(-2.0 * low, device=device)


class _Codebook:
    def _half_steps(self, x: Tensor, space: Workspace) -> Tensor:
        place = space("place", *x.shape)
        torch.add(_tables(x.device)[2], x, alpha=2, out=place)
        return space("index", x.numel(), dtype=torch.int32).copy_(place.view(-1))

    def nearest(self, x: Tensor, space: Workspace) -> Tensor:
        """x rounded, in place, to the grid."""
        steps = self._half_steps(x.clamp_(IQ4_VALUES[0], IQ4_VALUES[-1]), space)
        torch.index_select(_tables(x.device)[0], 0, steps, out=x.view(-1))
        return x

    def code(self, x: Tensor, space: Workspace) -> Tensor:
        """Numbers of the grid -> uint8 codes."""
        code = space("code", x.numel(), dtype=torch.uint8)
        return torch.index_select(_tables(x.device)[1], 0, self._half_steps(x, space), out=code).view(x.shape)


_starts = (-107.8, -122.1, -127.5, -134.7, 111.4, 118.5)
_weighted_starts = (-108.4, -124.9, -143.8, -177.7, 87.8, 116.4, 143.8, 235.6)

IQ4_NL = Symmetric(32, 1, _Codebook(), _starts, _weighted_starts, pack_q4_0)
IQ4_XS = Symmetric(
    *(32, 8, _Codebook(), _starts, _weighted_starts, pack_iq4_xs),
    scale_grid=Integers(-32, 31),
    scale_starts=(-28, -29.1, -30.2, -31.3, -32.4),
)
