"""Self-attention of tokens that are divided among devices: around it, tokens are exchanged for heads, and back.

Outside of it every device has its tokens with all heads; within it all tokens with its heads, so that a device holds
1/N of the keys and values (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509). What is sent travels while the
next span is projected.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from skyrun.kernels.quantized_keys import KeyRoom
from skyrun.parallel.group import Arriving, Group, as_bytes


class HasRows(Protocol):
    """A span: a range of tokens that are computed together."""

    @property
    def rows(self) -> slice: ...


Span = TypeVar("Span", bound=HasRows)
Find = Callable[[Tensor, Sequence[slice]], Tensor]


class SharedAttention(Generic[Span]):
    """The self-attention of one sequence of tokens [L, D] on the devices of a group.

    shares: the tokens of every rank. spans_of: the spans that they pass in. In round i every rank sends its span i; one
    with fewer spans sends nothing then. heads: of this rank.
    """

    def __init__(
        self, group: Group, shares: Sequence[slice], spans_of: Sequence[Sequence[Span]], dim: int, heads: int
    ) -> None:
        self._group, self._dim, self.heads = group, dim // group.size, heads // group.size
        self._shares, self._rounds = shares, list(zip_longest(*spans_of))

    def keys(self, project: Callable[[Span, Tensor, Tensor], None], like: Tensor) -> tuple[KeyRoom, Tensor]:
        """Keys and values of all tokens with the heads of this rank, [L, D / N] each.

        Args:
            project: writes keys and values [n, D] of a span.
            like: an empty tensor with their dtype and device.
        """
        room = KeyRoom(self._shares[-1].stop, self._dim, like.dtype, like.device)
        k, v = room.keys, like.new_empty(self._shares[-1].stop, self._dim)

        def send(number: int) -> Arriving:
            span = self._rounds[number][self._group.rank]
            count = 0 if span is None else span.rows.stop - span.rows.start
            pair = like.new_empty(2, count, self._group.size * self._dim)
            if span is not None:
                project(span, *pair)
            parts = self._by_heads(pair)
            del pair
            return self._to_heads(parts, _counts(self._rows(number)))

        arriving = send(0)
        for number in range(len(self._rounds)):
            later = send(number + 1) if number + 1 < len(self._rounds) else None
            arrived, start = arriving.wait().view(like.dtype), 0
            for rows in self._rows(number):
                size = (rows.stop - rows.start) * self._dim
                k[rows] = arrived[start : start + size].view(-1, self._dim)
                v[rows] = arrived[start + size : start + 2 * size].view(-1, self._dim)
                start += 2 * size
            del arrived
            arriving = later or arriving
        return room, v

    def queries(self, ranges: Sequence[slice], query: Callable[[slice], Tensor], like: Tensor) -> Tensor:
        """Queries of some tokens of all ranks with the heads of this one, [n, D / N].

        Args:
            ranges: of tokens, in order, each of one rank.
            query: makes the queries [n, D] of a range of own tokens.
            like: an empty tensor with their dtype and device.
        """
        of_rank = [[rows for rows in ranges if own.start <= rows.start < own.stop] for own in self._shares]
        q = torch.cat([self._nothing(like), *(query(rows).to(like.dtype) for rows in of_rank[self._group.rank])])
        arrived = self._to_heads(self._by_heads(q.unsqueeze(0)), [sum(_counts(theirs)) for theirs in of_rank]).wait()
        return arrived.view(like.dtype).view(-1, self._dim)

    def attended(self, query: Callable[[Span], Tensor], find: Find, like: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """Each span of this rank with what its tokens found, [n, D].

        Args:
            query: makes the queries [n, D] of a span.
            find: what queries [n, D / N] of ranges of tokens find among the keys of all, with the heads of this rank.
            like: an empty tensor with the queries' dtype and device.
        """

        def send(number: int) -> Arriving:
            span = self._rounds[number][self._group.rank]
            q = self._nothing(like) if span is None else query(span).to(like.dtype)
            return self._to_heads(self._by_heads(q.unsqueeze(0)), _counts(self._rows(number)))

        arriving, back = send(0), None
        for number in range(len(self._rounds)):
            later = send(number + 1) if number + 1 < len(self._rounds) else None
            mixed = find(arriving.wait().view(like.dtype).view(-1, self._dim), self._rows(number)).to(like.dtype)
            before, back = back, self._send_back(number, mixed)
            del mixed
            if before is not None:
                yield from self._found(number - 1, before, like)
            arriving = later or arriving
        assert back is not None
        yield from self._found(len(self._rounds) - 1, back, like)

    def _found(self, number: int, back: Arriving, like: Tensor) -> Iterator[tuple[Span, Tensor]]:
        found = back.wait().view(like.dtype).view(self._group.size, -1, self._dim).transpose(0, 1).flatten(1)
        span = self._rounds[number][self._group.rank]
        if span is not None:
            yield span, found

    def _by_heads(self, values: Tensor) -> Tensor:
        """What each rank gets of [each, n, D]: its heads, [N, each, n, D / N]."""
        parts: Tensor = values.unflatten(2, (self._group.size, -1))
        return parts.permute(2, 0, 1, 3).contiguous()

    def _to_heads(self, parts: Tensor, counts: Sequence[int]) -> Arriving:
        """Send every rank the own tokens with its heads. counts: tokens that each rank sends."""
        width = parts.shape[1] * self._dim * parts.element_size()
        receiving = [count * width for count in counts]
        return self._group.exchange(as_bytes(parts), [receiving[self._group.rank]] * self._group.size, receiving)

    def _send_back(self, number: int, mixed: Tensor) -> Arriving:
        """Send every rank its tokens of a round with the own heads."""
        sending = [count * mixed[:1].nbytes for count in _counts(self._rows(number))]
        return self._group.exchange(as_bytes(mixed), sending, [sending[self._group.rank]] * self._group.size)

    def _nothing(self, like: Tensor) -> Tensor:
        return like.new_empty(0, self._group.size * self._dim)

    def _rows(self, number: int) -> list[slice]:
        """The tokens of each rank in a round."""
        return [slice(0, 0) if span is None else span.rows for span in self._rounds[number]]


def _counts(ranges: Sequence[slice]) -> list[int]:
    return [rows.stop - rows.start for rows in ranges]
