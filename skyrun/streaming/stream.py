"""Stream blocks of weights: threads read the next ones from disk while the model computes with the current one.

A ring of a few buffers holds the current block and the next ones. No other blocks are in memory, except those that the
plan keeps resident. Blocks are read by their offsets in the header, whatever their order in the file.

Several devices may read a block together: each reads a share, and gets the others' while it computes with the block
before. Exchanges are started by the thread that runs the model, when it gets a block: so their order among those that
the block makes is the same on all devices.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from skyrun.events import BlockDone, now
from skyrun.kernels.machine.device import uses_triton
from skyrun.kernels.planes import to_planes
from skyrun.presets.memory import LOADERS
from skyrun.streaming.device import use_device
from skyrun.streaming.layout import Block, Piece
from skyrun.streaming.reader import PAGE, Extent, FileReader
from skyrun.streaming.ring import Arrival, make_ring
from skyrun.streaming.shares import Gathering, Neighbours, SharedBlock
from skyrun.streaming.staging import page_aligned
from skyrun.streaming.weights import Weights

ObserveBlock = Callable[[int, str, Tensor], None]  # as weights.Observe, with the index of the block first


@dataclass(frozen=True)
class _Loaded:
    """A piece or a whole block that has been read. arrival: when it is in the block's buffer on the device."""

    read_start: float
    read_end: float
    arrival: Arrival = None


@dataclass(frozen=True)
class _Loading:
    """A block whose pieces are being read. slot: of the ring, None for a block that stays in memory."""

    index: int
    slot: int | None
    buffer: Tensor
    pieces: list[Future[_Loaded]]


@dataclass(frozen=True)
class _Read:
    """A block that has been read, as far as it is read here. gathering: the rest of it, if others read that."""

    index: int
    slot: int | None
    buffer: Tensor
    pieces: list[_Loaded]
    gathering: Gathering | None


@dataclass
class StreamStats:
    """What a stream has done so far.

    read_seconds: how long at least one thread was reading. stall_seconds: how long the model waited for blocks.
    """

    bytes_read: int = 0
    read_seconds: float = 0.0
    stall_seconds: float = 0.0
    _reading: int = field(default=0, repr=False)
    _since: float = field(default=0.0, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def rate(self) -> float:
        """Bytes per second while reading."""
        return self.bytes_read / self.read_seconds if self.read_seconds else 0.0

    @property
    def hidden(self) -> float:
        """The share of reading that the model did not wait for."""
        return 1 - min(1.0, self.stall_seconds / self.read_seconds) if self.read_seconds else 1.0

    def reading(self, nbytes: int) -> None:
        """Record that a thread begins to read that many bytes."""
        with self._lock:
            self.bytes_read += nbytes
            if not self._reading:
                self._since = now()
            self._reading += 1

    def read(self) -> None:
        """Record that a thread has finished reading."""
        with self._lock:
            self._reading -= 1
            if not self._reading:
                self.read_seconds += now() - self._since


class BlockStream:
    """Yields the blocks of a file in order, `passes` times.

    Reading starts at once, and the first blocks of a pass are read during the pass before.

    slots: buffers of the ring, at least two. resident: indexes of blocks that are read once and stay in memory.
    observe: called with the input of every linear layer. fast: whether linear layers multiply in rotated int8.
    attention: its precision, of kernels.quantized_keys. adapters: files that blocks are read from too.
    neighbours: who reads shares of the blocks, and gets as many of them; None: this process reads them whole.
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
        attention: str = "exact",
        adapters: Sequence[Path] = (),
        neighbours: Neighbours | None = None,
    ) -> None:
        self.stats = StreamStats()
        self._observe, self._fast, self._attention = observe, fast, attention
        self._planar = uses_triton(device)
        self._path, self._blocks, self._device = path, blocks, device
        self._passes, self._resident = passes, resident
        self._kept: dict[int, Tensor] = {}
        self._shared = [SharedBlock(block, neighbours, self._planar) for block in blocks] if neighbours else None
        self._left = len(resident) + passes * (len(blocks) - len(resident))  # of what is read
        self._ahead: _Read | None = None
        slots = slots if len(resident) < len(blocks) else 0
        with ExitStack() as stack:
            self._readers = [stack.enter_context(closing(reader or FileReader(path)))]
            self._readers += [stack.enter_context(closing(FileReader(adapter))) for adapter in adapters]
            self._ring = make_ring(device, slots, len(resident), max(block.lead + block.nbytes for block in blocks))
            self._open_files = stack.pop_all()
        self._staged = self._ring.staged or self._planar
        self._scratch: SimpleQueue[Tensor] = SimpleQueue()
        self._free: SimpleQueue[int | None] = SimpleQueue()
        self._ready: SimpleQueue[_Loading | BaseException] = SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        self._closed = False
        self._loaders = ThreadPoolExecutor(LOADERS, thread_name_prefix=f"load {path.name}")
        self._thread = threading.Thread(target=self._load_all, name=f"order {path.name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BlockStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(RuntimeError) if kind else nullcontext():  # what failed first is what the caller has to know
            self.close()

    def close(self) -> None:
        """Stop reading and free all buffers."""
        self._closed = True
        self._free.put(None)
        self._open_files.close()  # first, so that threads that wait for it continue and fail
        self._thread.join()
        self._loaders.shutdown(cancel_futures=True)
        self._kept.clear()
        self._ring.close(self._ahead.gathering if self._ahead else None)

    def blocks(self) -> Iterator[tuple[Weights, "BlockClock"]]:
        """One pass: yields each block's weights, which are valid until the next block, and its clock."""
        for index, block in enumerate(self._blocks):
            buffer, slot, read_start, read_end = self._next(index)
            clock = BlockClock(index, len(self._blocks), read_start, read_end, now())
            observe = partial(self._observe, index) if self._observe else None
            name = f"block {index} of {self._path}"
            yield block.weights(name, buffer, observe, self._planar, self._fast, self._attention), clock
            if slot is not None:
                self._ring.release(slot)
                self._free.put(slot)
            self._ring.keep_pace()

    def _next(self, index: int) -> tuple[Tensor, int | None, float, float]:
        """The block's buffer, its slot, and when it was read."""
        if index in self._kept:
            return self._kept[index], None, now(), now()
        waiting = now()
        read, self._ahead = self._ahead or self._read_next(), None
        assert read.index == index, "blocks must be requested in the order in which they are read"
        if read.gathering is not None:
            read.gathering.wait()
        if self._shared is not None and self._left:
            self._ahead = self._read_next()
        self.stats.stall_seconds += now() - waiting
        self._ring.receive([piece.arrival for piece in read.pieces])
        if read.slot is None:
            self._kept[index] = read.buffer
        read_start = min((piece.read_start for piece in read.pieces), default=waiting)
        read_end = max((piece.read_end for piece in read.pieces), default=waiting)
        return read.buffer, read.slot, read_start, read_end

    def _read_next(self) -> _Read:
        """Wait until the next block, or the own share of it, has been read, and start to gather the others'."""
        loading = self._ready.get()
        if isinstance(loading, BaseException):
            raise loading
        pieces, gathering = [piece.result() for piece in loading.pieces], None
        self._left -= 1
        if self._shared is not None:
            start = partial(self._shared[loading.index].gather, loading.buffer)
            gathering = self._ring.gather(start, loading.slot)
        return _Read(loading.index, loading.slot, loading.buffer, pieces, gathering)

    @torch.inference_mode()  # the mode is per thread, and its tensors may only be changed in it
    def _load_all(self) -> None:
        """Find a buffer for every block, in order, and submit the block to the loaders."""
        try:
            use_device(self._device)
            kept = iter(self._ring.kept)
            for number in range(self._passes):
                for index, block in enumerate(self._blocks):
                    if self._closed:
                        return
                    if index in self._resident:
                        if number == 0:
                            self._load_kept(index, block, next(kept))
                        continue
                    slot = self._free.get()
                    if slot is None or self._closed:
                        return
                    buffer = self._ring.slots[slot][block.lead :]
                    self._ready.put(_Loading(index, slot, buffer, self._load(index, buffer, slot)))
        except BaseException as error:
            self._ready.put(error)

    def _load_kept(self, index: int, block: Block, memory: Tensor) -> None:
        buffer = memory[block.lead :]
        pieces = self._load(index, buffer, None)
        self._ready.put(_Loading(index, None, buffer, pieces))
        for piece in pieces:  # wait, since no slot limits how many blocks are read at a time
            piece.exception()

    def _load(self, index: int, buffer: Tensor, slot: int | None) -> list[Future[_Loaded]]:
        """Submit to the loaders what is read here of a block."""
        own = self._shared[index].own if self._shared is not None else self._blocks[index].runs(self._planar)
        if not self._staged:
            extents = [Extent(run.offset, run.nbytes, run.at + run.start, run.file) for run in own]
            return [self._loaders.submit(self._read, extents, buffer)]
        limit = self._ring.piece_bytes - PAGE
        return [self._loaders.submit(self._stage, piece, buffer, slot) for run in own for piece in run.split(limit)]

    @torch.inference_mode()
    def _read(self, extents: Sequence[Extent], buffer: Tensor) -> _Loaded:
        """Read extents into a buffer on the host."""
        start = now()
        self.stats.reading(sum(extent.nbytes for extent in extents))
        try:
            for file, some in groupby(extents, key=lambda extent: extent.file):
                self._readers[file].read(list(some), buffer)
        finally:
            self.stats.read()
        return _Loaded(start, now())

    @torch.inference_mode()
    def _stage(self, piece: Piece, buffer: Tensor, slot: int | None) -> _Loaded:
        """Read a piece, repack it into planes if it needs them, and send it to the buffer."""
        use_device(self._device)
        lead = piece.offset % PAGE  # as in Block.lead
        with self._ring.staging() as staged:
            if piece.info is None:
                loaded = self._read([Extent(piece.offset, piece.nbytes, lead, piece.file)], staged)
                staged = staged[lead:]
            else:
                with self._whole_blocks() as scratch:
                    loaded = self._read([Extent(piece.offset, piece.nbytes, lead, piece.file)], scratch)
                    blocks = scratch[lead:][: piece.nbytes].view(-1, piece.info.format.block_bytes)
                    to_planes(blocks, piece.info.format.name, staged[: piece.nbytes].view_as(blocks))
            return replace(loaded, arrival=self._ring.send(piece.moves(buffer, staged), slot))

    @contextmanager
    def _whole_blocks(self) -> Iterator[Tensor]:
        """A reusable buffer for a piece in the file's layout."""
        try:
            scratch = self._scratch.get_nowait()
        except Empty:
            scratch = page_aligned(self._ring.piece_bytes)
        yield scratch
        self._scratch.put(scratch)


@dataclass(frozen=True)
class BlockClock:
    """When a block was read and when the model got it."""

    index: int
    total: int
    read_start: float
    read_end: float
    compute_start: float

    def done(self) -> BlockDone:
        """The event for a block that the model has finished."""
        return BlockDone(self.index, self.total, self.read_start, self.read_end, self.compute_start, now())


def spread(resident: int, total: int) -> frozenset[int]:
    """`resident` of `total` block indexes, evenly spread so that the blocks in between are evenly spread too."""
    return frozenset(index * total // resident for index in range(resident)) if resident else frozenset()
