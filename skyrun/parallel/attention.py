"""Self-attention of tokens that are divided among devices: around it, tokens are exchanged for heads, and back.

Outside of it every device has its tokens with all heads; within it all tokens with its heads, so that a device holds
1/N of the keys and values (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509). What is sent travels while the
next span is projected.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from skyrun.kernels.attention import Keys, attend
from skyrun.kernels.quantized_keys import KeyRoom
from skyrun.parallel.group import Arriving, Group, as_bytes


class HasRows(Protocol):
    """A span: a range of tokens that are computed together."""

    @property
    def rows(self) -> slice: ...


Span = TypeVar("Span", bound=HasRows)


class SharedAttention(Generic[Span]):
    """The self-attention of one sequence of tokens [L, D] on the devices of a group.

    spans_of: the spans of every rank. In round i each sends its span i; one with fewer spans sends nothing then.
    """

    def __init__(self, group: Group, spans_of: Sequence[Sequence[Span]], dim: int, heads: int) -> None:
        self._group, self._dim, self._heads = group, dim // group.size, heads // group.size
        self._rounds = list(zip_longest(*spans_of))
        self._tokens = max(span.rows.stop for spans in spans_of for span in spans)

    def keys(self, project: Callable[[Span, Tensor, Tensor], None], like: Tensor, precision: str) -> Keys:
        """Keys and values of all tokens with the heads of this rank.

        Args:
            project: writes keys and values [n, D] of a span.
            like: an empty tensor with their dtype and device.
            precision: of the attention.
        """
        room = KeyRoom(self._tokens, self._dim, like.dtype, like.device)
        k, v = room.keys, like.new_empty(self._tokens, self._dim)

        def send(number: int) -> Arriving:
            span = self._rounds[number][self._group.rank]
            count = 0 if span is None else span.rows.stop - span.rows.start
            pair = like.new_empty(2, count, self._group.size * self._dim)
            if span is not None:
                project(span, *pair)
            parts = pair.unflatten(2, (self._group.size, -1)).permute(2, 0, 1, 3).contiguous()
            return self._exchange(number, parts, 2)

        arriving = send(0)
        for number in range(len(self._rounds)):
            later = send(number + 1) if number + 1 < len(self._rounds) else None
            arrived, start = arriving.wait().view(like.dtype), 0
            for rows in self._rows(number):
                size = (rows.stop - rows.start) * self._dim
                k[rows] = arrived[start : start + size].view(-1, self._dim)
                v[rows] = arrived[start + size : start + 2 * size].view(-1, self._dim)
                start += 2 * size
            arriving = later or arriving
        return Keys(room, v, self._heads, precision)

    def attended(self, query: Callable[[Span], Tensor], keys: Keys, like: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """Each span of this rank with what its tokens found, [n, D].

        Args:
            query: makes the queries [n, D] of a span.
            keys: of all tokens, with the heads of this rank.
            like: an empty tensor with the queries' dtype and device.
        """

        def send(number: int) -> Arriving:
            span = self._rounds[number][self._group.rank]
            q = query(span).to(like.dtype) if span is not None else like.new_empty(0, self._group.size * self._dim)
            parts = q.unflatten(1, (self._group.size, -1)).transpose(0, 1).contiguous()
            return self._exchange(number, parts, 1)

        arriving, back = send(0), None
        for number in range(len(self._rounds)):
            later = send(number + 1) if number + 1 < len(self._rounds) else None
            mixed = attend(arriving.wait().view(like.dtype).view(-1, self._dim), keys).to(like.dtype)
            before, back = back, self._send_back(number, mixed)
            del mixed
            if before is not None:
                yield from self._found(number - 1, before, like)
            arriving = later or arriving
        assert back is not None
        yield from self._found(len(self._rounds) - 1, back, like)

    def _found(self, number: int, back: Arriving, like: Tensor) -> Iterator[tuple[Span, Tensor]]:
        found = back.wait().view(like.dtype)
        span = self._rounds[number][self._group.rank]
        if span is not None:
            yield span, found.view(self._group.size, -1, self._dim).transpose(0, 1).flatten(1)

    def _exchange(self, number: int, parts: Tensor, each: int) -> Arriving:
        """Send every rank the own tokens of a round with its heads. parts: [N, ..., D / N]. each: values per token."""
        width = each * self._dim * parts.element_size()
        counts = [(rows.stop - rows.start) * width for rows in self._rows(number)]
        return self._group.exchange(as_bytes(parts), [counts[self._group.rank]] * self._group.size, counts)

    def _send_back(self, number: int, mixed: Tensor) -> Arriving:
        """Send every rank its tokens of a round with the own heads."""
        counts = [(rows.stop - rows.start) * mixed[:1].nbytes for rows in self._rows(number)]
        return self._group.exchange(as_bytes(mixed), counts, [counts[self._group.rank]] * self._group.size)

    def _rows(self, number: int) -> list[slice]:
        """The tokens of each rank in a round."""
        return [slice(0, 0) if span is None else span.rows for span in self._rounds[number]]
