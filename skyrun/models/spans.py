"""Spans: ranges of tokens that pass through a block of the transformer together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

TimeEmbedding = tuple[Tensor, Tensor]  # float32: [D] for the head, and its projection [6, D] for the blocks


@dataclass(frozen=True)
class Span:
    """A range of tokens that pass through a block together and share a timestep."""

    rows: slice
    time: TimeEmbedding


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


def chunks(start: int, end: int, rows: int | None) -> list[slice]:
    """Slices that cover `start` to `end`, of at most `rows` each."""
    rows = rows or max(1, end - start)
    return [slice(first, min(first + rows, end)) for first in range(start, end, rows)]
