"""Rows of frames that are divided among devices: each has some, and neighbours lend those beyond its edges."""

import torch
from torch import Tensor

from skyrun.parallel.group import Group, as_bytes


class SharedRows:
    """Frames [T, H, W, C] of any scale of which each device of a group has a range of rows.

    shares: of each rank, at the scale of latents.
    """

    def __init__(self, group: Group, height: int) -> None:
        self._group, self._height, self._shares = group, height, group.shares(height)

    @property
    def own(self) -> slice:
        """The rows of latents that this device has."""
        return self._shares[self._group.rank]

    def lent(self, own: Tensor, margin: int) -> tuple[Tensor, int, int]:
        """The own rows with `margin` more of each neighbour, and how many these are above and below.

        A neighbour has at least that many rows.
        """
        rank, size = self._group.rank, self._group.size
        if not margin or size == 1:
            return own, 0, 0
        edges = {rank - 1: own[:, :margin], rank + 1: own[:, -margin:]}
        edges = {there: rows.contiguous() for there, rows in edges.items() if 0 <= there < size}
        counts = [edges[there].nbytes if there in edges else 0 for there in range(size)]
        parts = torch.cat([as_bytes(rows) for rows in edges.values()])
        got = self._group.exchange(parts, counts, counts).wait().view(own.dtype)
        lent = dict(zip(edges, got.view(len(edges), len(own), margin, *own.shape[2:]), strict=True))
        whole = [part for part in (lent.get(rank - 1), own, lent.get(rank + 1)) if part is not None]
        return torch.cat(whole, 1), margin * (rank - 1 in lent), margin * (rank + 1 in lent)

    def whole(self, own: Tensor, to: int | None = None) -> Tensor:
        """All rows of frames of which each device has its own; only on rank `to` if it is given, elsewhere none."""
        if self._group.size == 1:
            return own
        scale = own.shape[1] // (self.own.stop - self.own.start)
        counts = [(share.stop - share.start) * scale for share in self._shares]
        rows = self._group.gathered(own.movedim(1, 0).contiguous(), counts, to)
        return rows.movedim(0, 1)
