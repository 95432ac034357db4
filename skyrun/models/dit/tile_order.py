"""The order in which tokens stand: neighbours in time and space next to each other, so that attention may skip tiles.

Attention does not mind in which order tokens are. Its kernels work on tiles of queries and of keys that follow each
other; in frame, row, column order such a tile is a strip through a frame. Here tokens stand along a walk: through bars
of a few frames and a few rows from column to column, and back through the next bar. Wherever a tile begins, it is about
as long as it is wide and deep, so that edges need no padding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skyrun.kernels.tiles import Tiles


@dataclass(frozen=True)
class Frames:
    """Frames that follow each other in the sequence and are walked through together.

    count: how many. always: whether every query reads them: the first frame, references and given frames.
    """

    count: int
    always: bool = False


@dataclass(frozen=True)
class TileOrder:
    """Where the tokens of a clip stand.

    index: int64 [L], on the host: the token, in frame, row, column order, at each place. tokens: of a frame. tiles: the
    sizes of attention's tiles. always: ranges of places whose keys every query reads.
    """

    index: Tensor
    tokens: int
    tiles: Tiles
    always: tuple[tuple[int, int], ...] = ()
    _frames: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_frames", self.index // self.tokens)

    def arranged(self, values: Tensor) -> Tensor:
        """Rows [L, ...] of tokens in frame, row, column order, put where the tokens stand."""
        return values[self.index.to(values.device)]

    def restored(self, values: Tensor) -> Tensor:
        """The opposite of `arranged`."""
        result = torch.empty_like(values)
        result[self.index.to(values.device)] = values
        return result

    def by_frame(self, rows: slice, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """The frames that a range of places has tokens of, each with where these are in the range."""
        frames = self._frames[rows]
        for frame in frames.unique().tolist():
            yield frame, (frames == frame).nonzero().flatten().to(device)


def tile_order(frames: Sequence[Frames], rows: int, cols: int, tiles: Tiles) -> TileOrder:
    """The order of the tokens of a sequence.

    Args:
        frames: what the sequence consists of.
        rows: rows of tokens of a frame.
        cols: columns of tokens of a frame.
        tiles: the sizes of attention's tiles.
    """
    places: list[Tensor] = []
    always = []
    first = 0
    for part in frames:
        walked = torch.arange(first * rows * cols, (first + part.count) * rows * cols).view(part.count, rows, cols)
        places += _walk(walked, tiles.keys)
        if part.always:
            always.append((first * rows * cols, (first + part.count) * rows * cols))
        first += part.count
    return TileOrder(torch.cat(places), rows * cols, tiles, tuple(always))


def _walk(tokens: Tensor, tile: int) -> Iterator[Tensor]:
    """Pieces of a walk through tokens [F, rows, cols]."""
    deep = min(len(tokens), round(tile ** (1 / 3)))
    backwards = upwards = False
    for slab in tokens.tensor_split(_pieces(len(tokens), deep)):
        high = round(math.sqrt(tile / len(slab)))
        bars = slab.tensor_split(_pieces(slab.shape[1], high), 1)
        for bar in reversed(bars) if upwards else bars:
            columns = bar.permute(2, 0, 1)
            yield (columns.flip(0) if backwards else columns).flatten()
            backwards = not backwards
        upwards = not upwards


def _pieces(length: int, wanted: int) -> int:
    """Into how many pieces of about that length, none of them much shorter, something is cut."""
    return max(1, round(length / wanted))
