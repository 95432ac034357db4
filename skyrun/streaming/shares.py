"""Blocks of which each of several devices reads a share from disk; the shares of the others come from them.

What is exchanged is where it belongs: parts of the block's buffer are sent from there, and received there.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from skyrun.streaming.layout import Block, Piece


class Gathering(Protocol):
    """Shares on their way."""

    def wait(self) -> None:
        """Make work that is enqueued from now on wait for them. Raises SkyrunError if a device is gone."""


class Neighbours(Protocol):
    """This process among those that read from one disk.

    rank: its number. near: the numbers of all of them. What they start, they start in the same order.
    """

    rank: int
    near: Sequence[int]

    def complete(self, parts: Sequence[tuple[int, Tensor]]) -> Gathering:
        """Start to send the own ones of some tensors to all others, and to receive theirs in place.

        Args:
            parts: the tensors, uint8, each with the number of the process that has its content.
        """


class SharedBlock:
    """A block that several devices read together. planar: whether tensors that need planes are repacked.

    own: what this device reads.
    """

    def __init__(self, block: Block, neighbours: Neighbours, planar: bool) -> None:
        self._neighbours = neighbours
        shares = dict(zip(neighbours.near, block.shares(len(neighbours.near), planar), strict=True))
        self.own = shares[neighbours.rank]
        self._places = [(rank, place) for rank, share in shares.items() for place in _places(share)]

    def gather(self, buffer: Tensor) -> Gathering:
        """Start to make the block's buffer, in which the own share is, whole."""
        return self._neighbours.complete([(rank, buffer[place]) for rank, place in self._places])


def _places(share: Sequence[Piece]) -> list[slice]:
    """Where a share belongs in the buffer, in as few parts as possible: tensors that are whole follow each other."""
    joined: list[slice] = []
    for place in (place for piece in share for place in piece.places):
        if joined and joined[-1].stop == place.start:
            joined[-1] = slice(joined[-1].start, place.stop)
        else:
            joined.append(place)
    return joined
