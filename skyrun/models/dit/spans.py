"""Spans: ranges of tokens that pass through a block of the transformer together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skyrun.models.dit.tile_order import TileOrder

TimeEmbedding = tuple[Tensor, Tensor]  # float32: [D] for the head, and its projection [6, D] for the blocks


@dataclass(frozen=True)
class Span:
    """A range of tokens that pass through a block together and share a timestep.

    frames: for a model that hears, the frames that they are of, each with where its tokens are in the range.
    """

    rows: slice
    time: TimeEmbedding
    frames: tuple[tuple[int, Tensor | slice], ...] = ()


def divide(times: Sequence[TimeEmbedding], tokens: int, rows: int | None, own: slice) -> Iterator[Span]:
    """Spans of at most `rows` tokens that cover frames of `tokens` each, as far as they are `own` ones.

    Neighbours that share a time are joined.
    """
    start = 0
    for frame, time in enumerate(times):
        if frame + 1 == len(times) or times[frame + 1] is not time:
            for part in chunks(max(start, own.start), min((frame + 1) * tokens, own.stop), rows):
                yield Span(part, time)
            start = (frame + 1) * tokens


def hearing(span: Span, tokens: int, order: TileOrder | None, device: torch.device) -> Span:
    """The span with the frames of `tokens` tokens that it has tokens of."""
    rows = span.rows
    if order is not None:
        return replace(span, frames=tuple(order.by_frame(rows, device)))
    frames = range(rows.start // tokens, -(-rows.stop // tokens))
    parts = (slice(max(0, n * tokens - rows.start), (n + 1) * tokens - rows.start) for n in frames)
    return replace(span, frames=tuple(zip(frames, parts, strict=True)))


def chunks(start: int, end: int, rows: int | None) -> list[slice]:
    """Slices that cover `start` to `end`, of at most `rows` each."""
    rows = rows or max(1, end - start)
    return [slice(first, min(first + rows, end)) for first in range(start, end, rows)]
