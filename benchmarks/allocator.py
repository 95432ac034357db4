"""The rules of torch's CUDA allocator, so that a log of allocations can be replayed without a GPU.

Sizes are multiples of 512 bytes. Up to 1 MiB they come from a pool of small segments, above from one of large ones. The
smallest free block that is large enough is taken and what it has too much is split off; neighbours that are free are
joined. Segments are either allocations of 2 MiB, 20 MiB, or the size itself in multiples of 2 MiB; or, if they are
expandable, one range of addresses per pool, to whose gaps pages of 2 or 20 MiB are mapped. What is free is given back
only before an allocation fails. (c10/cuda/CUDACachingAllocator.cpp of torch 2.7 to 2.13.)
"""

from dataclasses import dataclass

MIB = 1 << 20
_ROUND, _SMALL, _LARGE_SEGMENT, _SEGMENT_ROUND = 512, MIB, 20 * MIB, 2 * MIB
_PAGE = {"small": 2 * MIB, "large": 20 * MIB}
_ENDLESS = 1 << 60
FREE, USED, UNMAPPED = "free", "used", "unmapped"


class OutOfMemory(Exception):
    """An allocation that would exceed the limit."""


@dataclass(eq=False)
class Block:
    """A range of a segment, with its neighbours there."""

    pool: str
    size: int
    state: str = FREE
    before: "Block | None" = None
    after: "Block | None" = None


class Allocator:
    """limit: bytes that may be reserved. expandable: whether segments are."""

    def __init__(self, limit: int, expandable: bool) -> None:
        self._limit, self._expandable = limit, expandable
        self.reserved = self.peak = 0
        self._blocks: dict[str, list[Block]] = {pool: [Block(pool, _ENDLESS, UNMAPPED)] for pool in _PAGE}

    def take(self, nbytes: int) -> Block:
        """Allocate. Raises OutOfMemory."""
        size = max(1, -(-nbytes // _ROUND)) * _ROUND
        pool = "small" if size <= _SMALL else "large"
        grow = self._map if self._expandable else self._new_segment
        block = self._smallest(pool, size) or grow(pool, size)
        if block is None:
            self._give_back_pages() if self._expandable else self._give_back_segments()
            block = grow(pool, size)
        if block is None:
            raise OutOfMemory(f"{nbytes} bytes, {self.reserved} of {self._limit} are reserved")
        left = block.size - size
        if left >= _ROUND if self._expandable or pool == "small" else left > _SMALL:
            self._split(block, size)
        block.state = USED
        return block

    def give(self, block: Block) -> None:
        """Free a block."""
        block.state = FREE
        self._join(block)

    def _smallest(self, pool: str, size: int) -> Block | None:
        fitting = (block for block in self._blocks[pool] if block.state == FREE and block.size >= size)
        return min(fitting, key=lambda block: block.size, default=None)

    def _reserve(self, nbytes: int) -> None:
        self.reserved += nbytes
        self.peak = max(self.peak, self.reserved)

    def _new_segment(self, pool: str, size: int) -> Block | None:
        least = _PAGE[pool] if size < _LARGE_SEGMENT // 2 else 0
        segment = max(least, -(-size // _SEGMENT_ROUND) * _SEGMENT_ROUND)
        if self.reserved + segment > self._limit:
            return None
        self._reserve(segment)
        block = Block(pool, segment)
        self._blocks[pool].append(block)
        return block

    def _map(self, pool: str, size: int) -> Block | None:
        """The first gap that is large enough together with what is free around it, mapped as far as needed."""
        if self.reserved + size > self._limit:
            return None
        for gap in [block for block in self._blocks[pool] if block.state == UNMAPPED]:
            start = gap.before if gap.before is not None and gap.before.state == FREE else gap
            room, last = 0, start
            while room < size and last is not None and last.state != USED:
                room, last = room + last.size, last.after
            if room >= size:
                break
        block = start
        while block.size < size or block.state == UNMAPPED:
            gap = block if block.state == UNMAPPED else block.after
            missing = size - (0 if gap is block else block.size)
            mapped = min(gap.size, -(-missing // _PAGE[pool]) * _PAGE[pool])
            if mapped < gap.size:
                self._split(gap, mapped)
            self._reserve(mapped)
            gap.state = FREE
            block = self._join(gap)
        return block

    def _give_back_segments(self) -> None:
        for blocks in self._blocks.values():
            for block in [b for b in blocks if b.state == FREE and b.before is b.after is None]:
                blocks.remove(block)
                self.reserved -= block.size

    def _give_back_pages(self) -> None:
        for pool, blocks in self._blocks.items():
            page = _PAGE[pool]
            for block in [b for b in blocks if b.state == FREE]:
                lead = -self._start(block) % page
                whole = (block.size - lead) // page * page
                if whole <= 0:
                    continue
                if lead:
                    block = self._split(block, lead)
                if whole < block.size:
                    self._split(block, whole)
                block.state = UNMAPPED
                self.reserved -= whole
                self._join(block)

    @staticmethod
    def _start(block: Block) -> int:
        at = 0
        while (before := block.before) is not None:
            at, block = at + before.size, before
        return at

    def _split(self, block: Block, size: int) -> Block:
        """Split off what is beyond `size`, in the same state."""
        rest = Block(block.pool, block.size - size, block.state, block, block.after)
        if rest.after is not None:
            rest.after.before = rest
        block.size, block.after = size, rest
        self._blocks[block.pool].append(rest)
        return rest

    def _join(self, block: Block) -> Block:
        """Join a block with neighbours in the same state."""
        if block.before is not None and block.before.state == block.state:
            block = block.before
        while (after := block.after) is not None and after.state == block.state:
            block.size, block.after = block.size + after.size, after.after
            if block.after is not None:
                block.after.before = block
            self._blocks[block.pool].remove(after)
        return block
