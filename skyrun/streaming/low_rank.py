"""What adapters (LoRA) add to layers: products of two thin matrices, beside that with the quantized weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.rotated import RotatedInt8
from skyrun.kernels.torch.int8 import rotate
from skyrun.presets.memory import ADAPTER_ROWS


@dataclass(frozen=True)
class Addition:
    """What an adapter adds to a tensor: scale * up @ down or, without a down, scale * up.

    up: [rows, rank], or of the tensor's shape. down: [rank, cols]. Both have the dtype of the file.
    """

    up: Tensor
    down: Tensor | None
    scale: float

    def dense(self) -> Tensor:
        """All that is added, float32."""
        up = self.up.float() * self.scale
        return up if self.down is None else up.flatten(1) @ self.down.float().flatten(1)


def with_additions(weight: Tensor, additions: Sequence[Addition]) -> Tensor:
    """A decoded tensor with what adapters add to it, in its dtype."""
    if not additions:
        return weight
    whole = weight.float()
    for addition in additions:
        whole = whole + addition.dense().view(weight.shape)
    return whole.to(weight.dtype)


def add_products(
    y: Tensor, x: Tensor | RotatedInt8, additions: Sequence[Addition], gate: Tensor | None = None
) -> Tensor:
    """Add gate * x @ (what adapters add to a weight)^T to y, in place.

    Rotated rows meet matrices that are rotated too, which leaves products as they are: x A^T = (x H) (A H)^T.

    Args:
        y: the layer's output [..., rows].
        x: the layer's input [..., cols], in a dtype of its own.
        additions: to the layer's weight.
        gate: float32 [rows]; None stands for ones.
    """
    flat = y.view(-1, y.shape[-1])
    for down, up in _stacked(additions, isinstance(x, RotatedInt8), gate, y.dtype):
        for part, rows in _plain_rows(x, y.dtype, whole=down is not None):
            thin = rows if down is None else F.linear(rows, down.to(rows.dtype))
            flat[part].addmm_(thin.to(y.dtype), up.T)
    return y


def _stacked(
    additions: Sequence[Addition], rotated: bool, gate: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Pairs of down [rank, cols] and up [rows, rank]: all products as one, then each difference without a down."""

    def scaled(one: Addition) -> Tensor:
        up = one.up.flatten(1).float() * one.scale
        return up if gate is None else up * gate.unsqueeze(1)

    def turned(matrix: Tensor) -> Tensor:
        return (rotate(matrix.flatten(1).float()) if rotated else matrix.flatten(1)).to(dtype)

    products = [(one.down, scaled(one)) for one in additions if one.down is not None]
    if products:
        yield torch.cat([turned(down) for down, _ in products]), torch.cat([up for _, up in products], 1).to(dtype)
    for one in additions:
        if one.down is None:
            yield None, turned(scaled(one))


def _plain_rows(x: Tensor | RotatedInt8, dtype: torch.dtype, whole: bool) -> Iterator[tuple[slice, Tensor]]:
    """The rows of x as a matrix; those that are converted some at a time, so that they are never whole in memory.

    whole: whether rows may stay in a dtype of their own.
    """
    if isinstance(x, Tensor) and (whole or x.dtype == dtype):
        yield slice(None), x.reshape(-1, x.shape[-1])
        return
    codes = x if isinstance(x, Tensor) else x.codes
    flat, scales = codes.reshape(-1, x.shape[-1]), None if isinstance(x, Tensor) else x.scales.view(-1, 1)
    for start in range(0, len(flat), ADAPTER_ROWS):
        part = slice(start, start + ADAPTER_ROWS)
        yield part, (flat[part] if scales is None else flat[part] * scales[part]).to(dtype)
