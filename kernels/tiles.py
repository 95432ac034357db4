"""Tiles of queries and keys: their sizes, their means, and lists of those that are read."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """How many queries share a list of keys, and how many keys are read or skipped together."""

    queries: int
    keys: int

    def count_queries(self, queries: int) -> int:
        """How many tiles so many queries make, the last one perhaps ragged."""
        return -(-queries // self.queries)

    def count_keys(self, keys: int) -> int:
        """How many tiles so many keys make, the last one perhaps ragged."""
        return -(-keys // self.keys)


USUAL = Tiles(128, 64)  # of the Triton kernels
SMALL = Tiles(16, 8)  # of the torch twin, for models whose clips have few tokens
# Tiles whose members have a lower mean cosine with each other are not represented by their mean.
ALIKE = 0.2
# The threshold of a tile's probability is found by halving its range so many times.
HALVINGS = 20


@dataclass(frozen=True)
class Pools:
    """T tiles of H heads, pooled.

    codes: int8 [T, H * 128], means of the members. scales: float32 [H, T], what a code of 1 stands for. alike: bool
    [H, T], whether the mean stands for its members.
    """

    codes: Tensor
    scales: Tensor
    alike: Tensor


@dataclass(frozen=True)
class Selection:
    """The tiles of keys that each of T tiles of queries reads, by head.

    lists: int16 [H, T, K], of K tiles of keys; only the first `counts`, int32 [H, T], of a row count. They are whole
    tiles, in order; keys after the last whole tile are always read. keys: how many there are.
    """

    lists: Tensor
    counts: Tensor
    keys: int
    tiles: Tiles

    def read(self) -> Tensor:
        """How many tiles are read by each head, int64 [H]."""
        ragged = self.counts.shape[1] * (self.keys % self.tiles.keys > 0)
        return self.counts.sum(1) + ragged
