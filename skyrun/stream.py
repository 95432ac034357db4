"""Blocks of weights that pass by: read ahead from disk by a thread while the model works on the block before.

A ring of a few buffers holds the block in use and the next ones; nothing else of the blocks is in memory, except
those that the plan keeps. Blocks are found by the offsets in the header, in whatever order the file has them.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from skyrun.device import make_ring
from skyrun.errors import SkyrunError
from skyrun.events import BlockDone, now
from skyrun.kernels.device import uses_triton
from skyrun.kernels.gguf_file import TensorInfo
from skyrun.kernels.planes import to_planes
from skyrun.kernels.reading import open_unbuffered, read_into
from skyrun.weights import Observe, Weights, as_weight, has_planes

_ALIGNMENT = 32
_GAP = 1 << 16  # extents closer than this are read as one

ObserveBlock = Callable[[int, str, Tensor], None]  # as weights.Observe, after the index of the block


@dataclass(frozen=True)
class Extent:
    """A run of bytes of the file and its place in a buffer."""

    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True)
class Block:
    """One block of a file: its tensors by name within the block, and the extents that hold them."""

    tensors: tuple[tuple[str, TensorInfo, int], ...]
    extents: tuple[Extent, ...]
    nbytes: int

    def weights(
        self, owner: str, buffer: Tensor, observe: Observe | None = None, planar: bool = False, fast: bool = False
    ) -> Weights:
        """Views of the buffer, without a copy. planar: it went through `to_planes`. fast: multiply in rotated int8."""
        views = {name: as_weight(buffer[at : at + info.nbytes], info, planar, fast) for name, info, at in self.tensors}
        return Weights(owner, views, observe, fast)

    def to_planes(self, buffer: Tensor) -> None:
        """Lay the fields of blocks apart, in place, where kernels want them so."""
        for _, info, at in self.tensors:
            if has_planes(info):
                blocks = buffer[at : at + info.nbytes].view(-1, info.format.row_bytes(info.shape[-1]))
                blocks.copy_(to_planes(blocks, info.format.name))


def lay_out(tensors: dict[str, TensorInfo]) -> Block:
    """Place the tensors of a block in a buffer the way they lie in the file, large gaps left out."""
    extents: list[Extent] = []
    placed = []
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        last = extents[-1] if extents else None
        if last and info.offset - (last.offset + last.nbytes) < _GAP:
            extents[-1] = Extent(last.offset, info.offset + info.nbytes - last.offset, last.at)
        else:
            end = last.at + last.nbytes if last else 0
            extents.append(Extent(info.offset, info.nbytes, -(-end // _ALIGNMENT) * _ALIGNMENT))
        placed.append((name, info, extents[-1].at + info.offset - extents[-1].offset))
    return Block(tuple(placed), tuple(extents), extents[-1].at + extents[-1].nbytes)


def lay_out_blocks(path: Path, tensors: Mapping[str, TensorInfo], prefix: str) -> list[Block]:
    """The blocks `prefix0.`, `prefix1.`, ... of a file, in order. SkyrunError if the numbers have gaps."""
    numbered = re.compile(re.escape(prefix) + r"(\d{1,5})\.(.+)")
    blocks: dict[int, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if match := numbered.fullmatch(name):
            blocks.setdefault(int(match[1]), {})[match[2]] = info
        elif name.startswith(prefix):
            raise SkyrunError(f"{path} has a tensor {name} of no block", "convert or download it again")
    if not blocks or max(blocks) != len(blocks) - 1:
        found = f"blocks up to {max(blocks)}" if blocks else "none"
        raise SkyrunError(f"{path} has {len(blocks)} blocks {prefix}N, {found}", "convert or download it again")
    return [lay_out(blocks[index]) for index in range(len(blocks))]


class FileReader:
    """Fills buffers from a file."""

    def __init__(self, path: Path) -> None:
        self._file = open_unbuffered(path)

    def read(self, block: Block, buffer: Tensor) -> None:
        """Read the block's extents into the buffer, uint8 on the host."""
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        for extent in block.extents:
            read_into(self._file, view[extent.at : extent.at + extent.nbytes], extent.offset)

    def close(self) -> None:
        self._file.close()


@dataclass
class _Loaded:
    """A block that the reader has finished. slot is None for one that stays in memory."""

    index: int
    slot: int | None
    buffer: Tensor
    read_start: float
    read_end: float


@dataclass
class StreamStats:
    """What a stream has done so far. stall: time that the model waited for a block."""

    bytes_read: int = 0
    read_seconds: float = 0.0
    stall_seconds: float = 0.0


class BlockStream:
    """Hands out the blocks of a file in order, `passes` times over.

    resident: indexes of blocks that are read once and kept. slots: buffers of the ring, at least two. Reading of the
    first block starts at once, and of the first block of a pass during the pass before. observe: is shown the input of
    every linear layer of the blocks. fast: these multiply in rotated int8.
    """

    def __init__(
        self,
        path: Path,
        blocks: Sequence[Block],
        device: torch.device,
        *,
        passes: int = 1,
        slots: int = 3,
        resident: frozenset[int] = frozenset(),
        reader: FileReader | None = None,
        observe: ObserveBlock | None = None,
        fast: bool = False,
    ) -> None:
        self.stats = StreamStats()
        self._observe, self._fast = observe, fast
        self._planar = uses_triton(device)
        self._path, self._blocks, self._device = path, blocks, device
        self._passes, self._resident = passes, resident
        self._kept: dict[int, Tensor] = {}
        passing = [block.nbytes for index, block in enumerate(blocks) if index not in resident]
        slots = slots if passing else 0
        self._ring = make_ring(device, slots, max(passing, default=0))
        self._reader = reader or FileReader(path)
        self._free: SimpleQueue[int | None] = SimpleQueue()
        self._ready: SimpleQueue[_Loaded | BaseException] = SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        self._closed = False
        self._thread = threading.Thread(target=self._read_all, name=f"read {path.name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BlockStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading and let go of all buffers."""
        self._closed = True
        self._free.put(None)
        self._thread.join()
        self._reader.close()
        self._kept.clear()
        self._ring.close()

    def blocks(self) -> Iterator[tuple[Weights, "BlockClock"]]:
        """One pass: the weights of each block in order, valid until the next is asked for, and its clock."""
        for index, block in enumerate(self._blocks):
            loaded = self._next(index)
            clock = BlockClock(index, len(self._blocks), loaded.read_start, loaded.read_end, now())
            observe = partial(self._observe, index) if self._observe else None
            name = f"block {index} of {self._path}"
            yield block.weights(name, loaded.buffer, observe, self._planar, self._fast), clock
            if loaded.slot is not None:
                self._ring.release(loaded.slot)
                self._free.put(loaded.slot)
            self._ring.keep_pace()

    def _next(self, index: int) -> _Loaded:
        if index in self._kept:
            return _Loaded(index, None, self._kept[index], now(), now())
        waiting = now()
        loaded = self._ready.get()
        self.stats.stall_seconds += now() - waiting
        if isinstance(loaded, BaseException):
            raise loaded
        assert loaded.index == index, "blocks are asked for in the order they are read"
        if loaded.slot is None:
            self._kept[index] = loaded.buffer
        else:
            self._ring.receive(loaded.slot)
        return loaded

    @torch.inference_mode()  # the mode is per thread, and buffers made in it may only be filled in it
    def _read_all(self) -> None:
        try:
            for turn in range(self._passes):
                for index, block in enumerate(self._blocks):
                    if self._closed:
                        return
                    if index in self._resident:
                        if turn == 0:
                            self._ready.put(self._read_kept(index, block))
                        continue
                    slot = self._free.get()
                    if slot is None or self._closed:
                        return
                    self._ready.put(self._read_passing(index, block, slot))
        except BaseException as error:
            self._ready.put(error)

    def _read_passing(self, index: int, block: Block, slot: int) -> _Loaded:
        host = self._ring.host(slot)
        start = now()
        self._read(block, host)
        loaded = _Loaded(index, slot, self._ring.slots[slot], start, now())
        self._ring.send(slot, block.nbytes)
        self._count(block, loaded)
        return loaded

    def _read(self, block: Block, host: Tensor) -> None:
        self._reader.read(block, host)
        if self._planar:
            block.to_planes(host)

    def _read_kept(self, index: int, block: Block) -> _Loaded:
        host = torch.empty(block.nbytes, dtype=torch.uint8)
        start = now()
        self._read(block, host)
        loaded = _Loaded(index, None, host, start, now())
        loaded.buffer = host.to(self._device)
        self._count(block, loaded)
        return loaded

    def _count(self, block: Block, loaded: _Loaded) -> None:
        self.stats.bytes_read += block.nbytes
        self.stats.read_seconds += loaded.read_end - loaded.read_start


@dataclass(frozen=True)
class BlockClock:
    """When a block was read and when the model got it."""

    index: int
    total: int
    read_start: float
    read_end: float
    compute_start: float

    def done(self) -> BlockDone:
        """The event that says that the model has finished this block."""
        return BlockDone(self.index, self.total, self.read_start, self.read_end, self.compute_start, now())


def spread(resident: int, total: int) -> frozenset[int]:
    """`resident` of `total` block indexes, evenly spread, so that they ease the need for reading evenly."""
    return frozenset(index * total // resident for index in range(resident)) if resident else frozenset()
