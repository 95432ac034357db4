"""The order of reads, copies and kernels, proved with vector clocks; and mutants of the code that must not pass."""

import itertools
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_ring import BLOCKS, model
from vector_clocks import Clocks, Event, Stream, followed

from skyrun.kernels import QuantizedWeight
from skyrun.presets import memory
from skyrun.streaming import ring as ring_module
from skyrun.streaming import staging
from skyrun.streaming import stream as stream_module
from skyrun.streaming.reader import FileReader
from skyrun.streaming.ring import CudaRing
from skyrun.streaming.shares import SharedBlock
from skyrun.streaming.staging import PageLocked, Parking
from skyrun.streaming.stream import BlockStream, spread
from skyrun.streaming.tokens import ParkedTokens

__all__ = ["model"]  # a fixture
CPU = torch.device("cpu")
TOKENS, DIM, ROWS = 48, 64, 20  # of 128 bytes each; a part passes through both buffers more than once
PASSES = 3


@pytest.fixture
def clocks(monkeypatch):
    """Clocks in the place of CUDA, with everything followed that is no copy of torch."""
    clocks = Clocks()

    def empty(*arguments, **keywords):
        made = torch.empty(*arguments, **keywords)
        clocks.on_stream("the owner before", writes=(made,))  # memory of the allocator was used by the default stream
        return made

    namespace = SimpleNamespace(**{**vars(torch), "cuda": clocks})
    monkeypatch.setattr(ring_module, "torch", SimpleNamespace(**{**vars(namespace), "empty": empty}))
    monkeypatch.setattr(staging, "torch", namespace)
    monkeypatch.setattr(memory, "_PIECE", 8192)
    monkeypatch.setattr(staging, "PARKING_PIECE", 1024)
    for module in (staging, stream_module):
        aligned = module.page_aligned
        monkeypatch.setattr(module, "page_aligned", lambda n, aligned=aligned: clocks.register(aligned(n)))
    read, to_planes = FileReader.read, stream_module.to_planes

    def followed_read(self, extents, buffer):
        read(self, extents, buffer)
        clocks.on_host("read", writes=tuple(buffer[e.at : e.at + e.nbytes] for e in extents))

    def followed_planes(blocks, type, out):
        clocks.on_host("lay apart", reads=(blocks,), writes=(out,))
        return to_planes(blocks, type, out)

    monkeypatch.setattr(FileReader, "read", followed_read)
    monkeypatch.setattr(stream_module, "to_planes", followed_planes)
    monkeypatch.setattr(stream_module, "make_ring", CudaRing)
    with followed(clocks, ring_module, stream_module):
        yield clocks


def kernel(clocks, weights, block):
    """A kernel that reads every matrix of a block."""
    for name, info, _ in block.tensors:
        if len(info.shape) == 2:
            weight = weights[name]
            clocks.on_stream("kernel", reads=(weight.data if isinstance(weight, QuantizedWeight) else weight,))


class Lacking(Exception):
    """Memory ran out, as the test wants it."""


def is_copied_ahead(stream):
    """Whether the block after the one in use is whole on the device. Then nothing is read until a slot is free.

    A loader that reads on waits for earlier copies, and closing waits for the loader.
    """
    return stream._ready.qsize() > 0 and all(future.done() for future in stream._loaders.submitted)


class Others:
    """Further devices, with which shares of blocks are exchanged on a stream that is not ours."""

    def __init__(self, clocks, rank, size):
        self.rank, self.near = rank, range(size)
        self._clocks, self._stream = clocks, clocks.Stream()

    def complete(self, parts):
        self._stream.wait_stream(self._clocks.current_stream())
        own, theirs = (tuple(part for rank, part in parts if (rank == self.rank) is mine) for mine in (True, False))
        with self._clocks.stream(self._stream):
            self._clocks.on_stream("gather", reads=own, writes=theirs)
        self.done = self._stream.record_event()
        return Gathering(self._clocks, self.done)


class Gathering:
    """What others send and receive, until it is done."""

    def __init__(self, clocks, done):
        self._clocks, self._done = clocks, done

    def wait(self):
        self._clocks.current_stream().wait_event(self._done)


def streamed(model, clocks, slots, kept, lacking=None, ahead=False, others=None):
    """Stream a file through a ring, and use its memory for something else afterwards.

    lacking: in which block memory runs out after its kernels are enqueued, and with `ahead` not before the copies of
    the next block are on their way. others: read shares of the blocks.
    """
    path, blocks, _ = model
    resident = spread(kept, BLOCKS)
    try:
        with BlockStream(path, blocks, CPU, passes=PASSES, slots=slots, resident=resident, neighbours=others) as stream:
            ring = stream._ring
            device, host = [*ring.slots, *ring.kept], ring._locked._memory
            for number in range(PASSES):
                for index, (weights, _) in enumerate(stream.blocks()):
                    kernel(clocks, weights, blocks[index])
                    if (number, index) == lacking:
                        while ahead and not is_copied_ahead(stream):
                            time.sleep(0.001)
                        raise Lacking
    except (Lacking, torch.OutOfMemoryError):
        pass
    clocks.on_stream("the owner after", writes=tuple(device))
    clocks.on_host("the owner after", writes=(host,))


def parked(clocks, parts=3, lacking=None):
    """Tokens that wait on the host pass through blocks. lacking: in which part memory runs out."""
    tokens = ParkedTokens((TOKENS, DIM), torch.bfloat16, CPU)
    clocks.register(tokens._values)
    tokens._parking = Parking(CPU)
    host = tokens._parking._buffers._memory
    rows = [slice(start, min(start + ROWS, TOKENS)) for start in range(0, TOKENS, ROWS)]
    try:
        for number, part in itertools.product(range(parts), rows):
            values = tokens.fetch(part)
            clocks.on_stream("kernel", reads=(values,))
            changed = torch.zeros_like(values)
            clocks.on_stream("kernel", writes=(changed,))
            if (number, rows.index(part)) == lacking:
                raise Lacking
            tokens.store(part, changed)
    except Lacking:
        pass
    tokens.close()
    clocks.on_host("the owner after", writes=(host, tokens._values))


RINGS = [(2, 0), (3, 2), (2, BLOCKS)]  # slots, kept blocks


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(("slots", "kept"), RINGS)
@pytest.mark.parametrize("lacking", [None, (0, 0), (1, 3), (PASSES - 1, BLOCKS - 1)])
def test_a_ring_has_no_race(model, clocks, monkeypatch, planar, slots, kept, lacking):
    monkeypatch.setattr(stream_module, "uses_triton", lambda device: planar)
    streamed(model, clocks, slots, kept, lacking)
    assert {access.what for access in clocks.accesses} >= {"read", "copy", "kernel", "the owner after"}
    assert not clocks.races()


@pytest.mark.parametrize("lacking", [None, (0, 0), (1, 2)])
def test_parked_tokens_have_no_race(clocks, lacking):
    parked(clocks, lacking=lacking)
    assert {access.what for access in clocks.accesses} >= {"copy", "copy on the host", "kernel"}
    assert not clocks.races()


@pytest.mark.parametrize("call", [0, 7, 20])
def test_a_copy_that_lacks_memory_makes_no_race(model, clocks, monkeypatch, call):
    monkeypatch.setattr(stream_module, "uses_triton", lambda device: True)
    fail_copies(monkeypatch, call)
    streamed(model, clocks, 2, 0)
    assert not clocks.races()


def fail_copies(monkeypatch, *calls):
    """Copies of a piece lack memory after the first of its fields is on its way."""
    send, count = CudaRing.send, itertools.count()

    def lacks(self, moves, slot):
        if next(count) not in calls:
            return send(self, moves, slot)
        send(self, moves[:1], slot)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(CudaRing, "send", lacks)


def without_a_share(model, clocks):
    """A device among so many that nothing is left for it to read."""
    ranks = (Others(clocks, rank, 40) for rank in range(40))
    return next(others for others in ranks if not SharedBlock(model[1][0], others, True).own)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(("slots", "kept"), RINGS)
@pytest.mark.parametrize("lacking", [None, (1, 3)])
@pytest.mark.parametrize("empty", [False, True])
def test_a_ring_that_gets_shares_has_no_race(model, clocks, monkeypatch, planar, slots, kept, lacking, empty):
    monkeypatch.setattr(stream_module, "uses_triton", lambda device: planar)
    others = without_a_share(model, clocks) if empty else Others(clocks, 1, 2)
    streamed(model, clocks, slots, kept, lacking, others=others)
    assert {access.what for access in clocks.accesses} >= {"gather", "kernel", "the owner after"}
    assert not clocks.races()


def nothing(*_, **__):
    pass


def forget_gatherings(monkeypatch):
    monkeypatch.setattr(Gathering, "wait", nothing)


def gather_on_the_stream_of_kernels(monkeypatch):
    monkeypatch.setattr(CudaRing, "gather", lambda self, start, slot: start())


def gather_into_slots_in_use(monkeypatch):
    gather = CudaRing.gather
    monkeypatch.setattr(CudaRing, "gather", lambda self, start, slot: gather(self, start, None))


def close_while_shares_arrive(monkeypatch):
    close = CudaRing.close
    monkeypatch.setattr(CudaRing, "close", lambda self, unfinished: close(self))


@pytest.mark.parametrize(
    ("mutate", "empty", "lacking", "race"),
    [
        (forget_gatherings, False, None, ("gather", "kernel")),
        (forget_gatherings, False, None, ("copy", "gather")),
        (gather_on_the_stream_of_kernels, False, None, ("copy", "gather")),
        (gather_into_slots_in_use, True, None, ("gather", "kernel")),
        (close_while_shares_arrive, False, (1, 2), ("gather", "the owner after")),
    ],
)
def test_mutants_of_gathering_race(model, clocks, monkeypatch, mutate, empty, lacking, race):
    monkeypatch.setattr(stream_module, "uses_triton", lambda device: True)
    mutate(monkeypatch)
    others = without_a_share(model, clocks) if empty else Others(clocks, 0, 2)
    streamed(model, clocks, 2, 0, lacking, others=others)
    assert race in clocks.races()


def forget_releases(monkeypatch):
    monkeypatch.setattr(CudaRing, "release", nothing)


def forget_arrivals(monkeypatch):
    monkeypatch.setattr(CudaRing, "receive", nothing)


def forget_events_on_the_host(monkeypatch):
    monkeypatch.setattr(Event, "synchronize", nothing)


def forget_the_owner_before(monkeypatch):
    monkeypatch.setattr(Stream, "wait_stream", nothing)


def close_at_once(monkeypatch):
    monkeypatch.setattr(Stream, "synchronize", nothing)


def forget_events_of_a_stream(monkeypatch):
    monkeypatch.setattr(Stream, "wait_event", nothing)


def mark_staging_before_its_copies(monkeypatch):
    """The event that frees a staging buffer is recorded by the stream that computes."""
    record = Event.record
    monkeypatch.setattr(Event, "record", lambda self, stream: record(self, stream.clocks.default))


def hand_slots_out_early(monkeypatch):
    """A slot is free as soon as its block is handed to the model: it is released before its kernels."""
    receive = CudaRing.receive

    def releases(self, arrivals):
        for slot in range(len(self.slots)):
            release(self, slot)
        receive(self, arrivals)

    release = CudaRing.release
    monkeypatch.setattr(CudaRing, "receive", releases)
    monkeypatch.setattr(CudaRing, "release", nothing)


@pytest.mark.parametrize(
    ("mutate", "race"),
    [
        (forget_releases, ("copy", "kernel")),
        (forget_arrivals, ("copy", "kernel")),
        (forget_events_of_a_stream, ("copy", "kernel")),
        (hand_slots_out_early, ("copy", "kernel")),
        (forget_events_on_the_host, ("copy", "read")),
        (mark_staging_before_its_copies, ("copy", "read")),
        (forget_the_owner_before, ("copy", "the owner before")),
        (close_at_once, ("copy", "the owner after")),
    ],
)
def test_mutants_of_a_ring_race(model, clocks, monkeypatch, mutate, race):
    monkeypatch.setattr(stream_module, "uses_triton", lambda device: False)
    mutate(monkeypatch)
    is_closed_midway = mutate is close_at_once
    streamed(model, clocks, 2, 0, (1, 2) if is_closed_midway else None, is_closed_midway)
    assert race in clocks.races()


def unmarked(self):
    """`staging` without its `finally`: a copy that fails leaves no mark of those before it."""
    buffer, copied = self._staging.get()
    copied.synchronize()
    try:
        yield buffer
        copied.record(self._copies)
    finally:
        self._staging.put((buffer, copied))


@pytest.mark.parametrize(
    ("staged", "races"), [(CudaRing.staging, set()), (contextmanager(unmarked), {("copy", "read")})]
)
def test_a_buffer_whose_copy_failed_waits_for_the_copies_before(clocks, staged, races):
    ring = CudaRing(CPU, 2, 0, 10_000)
    with pytest.raises(Lacking), staged(ring) as buffer:
        ring.send([(ring.slots[0][:4096], buffer[:4096])], 0)
        raise Lacking
    for _ in range(memory.STAGING_PIECES):
        with staged(ring) as buffer:
            clocks.on_host("read", writes=(buffer,))
    ring.close()
    assert clocks.races() == races


def refill_buffers_at_once(monkeypatch):
    monkeypatch.setattr(Parking, "_free", lambda self, turn: self._buffers.pieces[turn % len(self._copied)])


def forget_to_mark_buffers(monkeypatch):
    monkeypatch.setattr(Event, "record", nothing)


def mix_up_buffers(monkeypatch):
    """A turn waits for the event of the other buffer."""

    def other(self, turn):
        self._copied[(turn + 1) % len(self._copied)].synchronize()
        return self._buffers.pieces[turn % len(self._copied)]

    monkeypatch.setattr(Parking, "_free", other)


def close_parking_at_once(monkeypatch):
    monkeypatch.setattr(Parking, "close", lambda self: PageLocked.close(self._buffers))


@pytest.mark.parametrize(
    ("mutate", "race"),
    [
        (refill_buffers_at_once, ("copy", "copy on the host")),
        (forget_to_mark_buffers, ("copy", "copy on the host")),
        (mix_up_buffers, ("copy", "copy on the host")),
        (close_parking_at_once, ("copy", "the owner after")),
    ],
)
def test_mutants_of_parking_race(clocks, monkeypatch, mutate, race):
    mutate(monkeypatch)
    # A part that was fetched and not stored leaves copies on their way.
    parked(clocks, lacking=(1, 2) if mutate is close_parking_at_once else None)
    assert race in clocks.races()
