"""Frames cut into slabs of whole rows, so that a convolution works on a part of them at a time.

A slab is computed from its own rows and the neighbouring ones that the convolution reaches, so the parts join to
exactly what the whole gives: there is nothing to blend and no seam.
"""

from typing import NamedTuple

Tile = tuple[int, int]  # height, width in pixels


class Slab(NamedTuple):
    """Rows that are computed, and the rows they are computed from."""

    rows: slice  # of the frame: what this slab gives
    reach: slice  # of the frame: those and the neighbours they depend on
    inside: slice  # of the reach: the rows given


def cut(height: int, width: int, tile: Tile | None, margin: int) -> list[Slab]:
    """Slabs of about equal height, each of at most a tile's number of pixels, or of one row; None leaves frames whole.

    margin: rows above and below that an output row depends on.
    """
    most = height if tile is None else max(1, tile[0] * tile[1] // width)
    count = -(-height // most)
    edges = [index * height // count for index in range(count + 1)]
    return [_slab(start, stop, height, margin) for start, stop in zip(edges, edges[1:], strict=False)]


def _slab(start: int, stop: int, height: int, margin: int) -> Slab:
    first, last = max(0, start - margin), min(height, stop + margin)
    return Slab(slice(start, stop), slice(first, last), slice(start - first, stop - first))
