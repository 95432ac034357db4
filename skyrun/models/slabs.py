"""Slabs: ranges of rows of frames that are computed together, each with the neighbouring rows that it depends on."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Tile = tuple[int, int]  # height, width in pixels


class Slab(NamedTuple):
    """A range of rows that are computed together, and the rows that they depend on."""

    rows: slice  # of the frame: the rows that are computed
    reach: slice  # of what is there: those rows and the neighbours that they depend on
    inside: slice  # of `reach`: the rows that are computed


def cut(height: int, width: int, tile: Tile | None, margin: int, above: int = 0, below: int = 0) -> list[Slab]:
    """Cut frames into slabs of about equal height.

    Args:
        height: rows of a frame.
        width: columns of a frame.
        tile: a slab has at most as many pixels as a tile, or one row; None leaves frames whole.
        margin: how many rows above and below an output row depends on.
        above: how many rows are there above those of the frame, which are not computed.
        below: how many are there below them.
    """
    most = height if tile is None else max(1, tile[0] * tile[1] // width)
    count = -(-height // most)
    edges = [index * height // count for index in range(count + 1)]
    there = above + height + below
    return [_slab(start, stop, there, margin, above) for start, stop in zip(edges, edges[1:], strict=False)]


def _slab(start: int, stop: int, there: int, margin: int, above: int) -> Slab:
    first, last = max(0, start + above - margin), min(there, stop + above + margin)
    return Slab(slice(start, stop), slice(first, last), slice(start + above - first, stop + above - first))


def by_slab(
    slabs: list[Slab], compute: Callable[[int, Slab], Tensor], scale: int = 1, onto: Tensor | None = None
) -> Tensor:
    """Join the frames [T, H, W, C] that `compute` makes of each slab, or add them to `onto`.

    scale: rows of the result per row.
    """
    if len(slabs) == 1 and onto is None:
        return compute(0, slabs[0])
    out = onto
    for index, slab in enumerate(slabs):
        part = compute(index, slab)
        if out is None:
            out = part.new_empty(part.shape[0], slabs[-1].rows.stop * scale, *part.shape[2:])
        rows = out[:, slab.rows.start * scale : slab.rows.stop * scale]
        rows.copy_(part) if onto is None else rows.add_(part)
        del part
    assert out is not None
    return out
