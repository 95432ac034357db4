"""IQ4_NL and IQ4_XS: the search of the symmetric types with codes for sixteen unevenly spaced values."""

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from skyrun.kernels.torch.decode import IQ4_VALUES
from skyrun.quant.encoders.pack_symmetric import pack_iq4_xs, pack_q4_0
from skyrun.quant.encoders.symmetric import Integers, Symmetric
from skyrun.quant.encoders.tiles import Workspace

_LOW, _HIGH = IQ4_VALUES[0], IQ4_VALUES[-1]


@lru_cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest value and its code for each half step from _LOW to _HIGH, and the count of half steps from _LOW to 0.

    Midpoints between neighbouring values are multiples of 1/2, so each half step has one nearest value.
    """
    midpoints = torch.tensor([a + b for a, b in pairwise(IQ4_VALUES)])
    code = torch.bucketize(torch.arange(2 * _LOW, 2 * _HIGH + 1), midpoints, right=True)
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32)[code]
    return values.to(device), code.to(device, torch.uint8), torch.tensor(-2.0 * _LOW, device=device)


class _Codebook:
    def _half_steps(self, x: Tensor, space: Workspace) -> Tensor:
        steps = torch.add(_tables(x.device)[2], x, alpha=2, out=space("half steps", *x.shape))
        return space("index", x.numel(), dtype=torch.int32).copy_(steps.view(-1))

    def nearest(self, x: Tensor, reach: float, space: Workspace) -> Tensor:
        """Round x in place to the nearest values."""
        steps = self._half_steps(x.clamp_(_LOW, _HIGH), space)
        torch.index_select(_tables(x.device)[0], 0, steps, out=x.view(-1))
        return x

    def code(self, x: Tensor, space: Workspace) -> Tensor:
        """Values -> uint8 codes."""
        code = space("code", x.numel(), dtype=torch.uint8)
        return torch.index_select(_tables(x.device)[1], 0, self._half_steps(x, space), out=code).view(x.shape)


_starts = (-107.8, -122.1, -127.5, -134.7, 111.4, 118.5)
_weighted_starts = (-107.3, -126.4, -135.9, -157.8, -204.5, 112.1, 124.8, 144.8)

IQ4_NL = Symmetric(32, 1, _Codebook(), _starts, _weighted_starts, pack_q4_0)
IQ4_XS = Symmetric(
    *(32, 8, _Codebook(), _starts, _weighted_starts, pack_iq4_xs),
    scale_grid=Integers(-32, 31),
    scale_starts=(-28, -29.1, -30.2, -31.3, -32.4),
)
