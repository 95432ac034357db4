"""Blocks that several devices read together: shares are the block, and arrive whole on every device.

Ranks are threads here, and what they exchange is copied when all have started it and somebody waits, at the latest
possible moment.
"""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_ring import BLOCKS, Delayed, compare, cuda, model

from skyrun.errors import SkyrunError
from skyrun.presets import memory
from skyrun.streaming import stream as stream_module
from skyrun.streaming.reader import FileReader
from skyrun.streaming.shares import SharedBlock
from skyrun.streaming.stream import BlockStream, spread

__all__ = ["cuda", "model"]  # fixtures
CPU = torch.device("cpu")
PASSES = 3


class Gone(SkyrunError):
    """Another rank has ended."""


class Meeting:
    """Where ranks exchange parts. stand_in: in the place of CUDA, whose streams do it then."""

    def __init__(self, size, stand_in=None):
        self.size, self.stand_in = size, stand_in
        self._calls, self._met, self._gone = {}, threading.Condition(), False

    def call(self, number):
        with self._met:
            return self._calls.setdefault(number, {"parts": {}, "waiting": [], "done": False})

    def arrive(self, rank, number, parts):
        call = self.call(number)
        with self._met:
            call["parts"][rank] = parts
            if self.stand_in:
                stream = self.stand_in.current_stream()
                call["waiting"].append((stream, len(stream.work)))
            self._met.notify_all()
        return call

    def await_all(self, call):
        with self._met:
            self._met.wait_for(lambda: len(call["parts"]) == self.size or self._gone, 60)
            if len(call["parts"]) < self.size:
                raise Gone("another rank is gone")

    @torch.inference_mode()
    def finish(self, call):
        """Copy all parts to all ranks, once."""
        with self._met if not self.stand_in else Delayed.lock:
            if not call["done"]:
                call["done"] = True
                for stream, count in call["waiting"]:
                    stream.run(count)
                for place, (owner, source) in enumerate(call["parts"][0]):
                    source = call["parts"][owner][place][1]
                    for rank in set(range(self.size)) - {owner}:
                        call["parts"][rank][place][1].copy_(source)

    def leave(self):
        with self._met:
            self._gone = True
            self._met.notify_all()


class Seat:
    """A rank's place in a meeting."""

    def __init__(self, meeting, rank):
        self.rank, self.near, self.started = rank, range(meeting.size), 0
        self._meeting = meeting

    def complete(self, parts):
        number, self.started = self.started, self.started + 1
        return _Started(self._meeting, self._meeting.arrive(self.rank, number, parts))


class _Started:
    def __init__(self, meeting, call):
        self._meeting, self._call = meeting, call

    def wait(self):
        self._meeting.await_all(self._call)
        if stand_in := self._meeting.stand_in:
            stand_in.current_stream().enqueue(partial(self._meeting.finish, self._call))
        else:
            self._meeting.finish(self._call)


def on_all(size, work, meeting):
    """What `work(seat)` returns or raises on every rank."""

    def one(rank):
        try:
            return work(Seat(meeting, rank))
        except Exception as error:
            meeting.leave()
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, range(size)))


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 40])
def test_shares_are_the_block(model, size, planar):
    _, blocks, _ = model
    for block in blocks:
        runs = block.runs(planar)
        shares = [SharedBlock(block, Seat(Meeting(size), rank), planar) for rank in range(size)]
        read = [(piece.file, at) for one in shares for piece in one.own for at in _range(piece.offset, piece.nbytes)]
        assert sorted(read) == sorted((run.file, at) for run in runs for at in _range(run.offset, run.nbytes))
        sizes = [sum(piece.nbytes for piece in one.own) for one in shares]
        widest = max((run.info.format.block_bytes for run in runs if run.info), default=2)
        assert max(sizes) - min(sizes) <= 2 * 16 * widest
        places = [place for one in shares[0]._places for place in _range(one[1].start, one[1].stop - one[1].start)]
        assert len(set(places)) == len(places) == sum(sizes) and max(places) < block.nbytes


def _range(start, count):
    return range(start, start + count)


def test_a_share_is_sent_in_few_parts(model):
    """Whole tensors in one; of a tensor in planes that is cut, a part of each plane."""
    _, blocks, _ = model
    plain, planar = (SharedBlock(blocks[0], Seat(Meeting(2), 0), planes)._places for planes in (False, True))
    assert [rank for rank, _ in plain] == [0, 1]
    assert len(planar) <= 2 * (2 + 4)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("ring", ["host", "cuda"])
@pytest.mark.parametrize(("size", "resident", "slots"), [(2, 0, 2), (3, 2, 3), (4, BLOCKS, 2), (16, 1, 3)])
def test_all_ranks_get_whole_blocks(model, monkeypatch, cuda, ring, planar, size, resident, slots):
    path, blocks, contents = model
    monkeypatch.setattr(memory, "_PIECE", 8192)
    monkeypatch.setattr(stream_module, "uses_triton", lambda device: planar)
    stand_in = cuda() if ring == "cuda" else None
    kept, threads, wrong = spread(resident, BLOCKS), threading.active_count(), []

    def work(seat):
        with BlockStream(path, blocks, CPU, passes=PASSES, slots=slots, resident=kept, neighbours=seat) as stream:
            for _ in range(PASSES):
                for index, (weights, _) in enumerate(stream.blocks()):
                    kernel = partial(compare, blocks[index], weights, contents[index], planar, wrong)
                    stand_in.default.enqueue(kernel) if stand_in else kernel()
            if stand_in:
                stand_in.default.synchronize()
        return stream.stats.bytes_read, seat.started

    done = on_all(size, work, Meeting(size, stand_in))
    assert not wrong and all(isinstance(one, tuple) for one in done), done
    whole = sum(
        run.nbytes * (1 if index in kept else PASSES) for index in range(BLOCKS) for run in blocks[index].runs(planar)
    )
    assert sum(nbytes for nbytes, _ in done) == whole
    if size < 16:
        assert max(nbytes for nbytes, _ in done) <= 1.2 * whole / size
    assert {started for _, started in done} == {resident + PASSES * (BLOCKS - resident)}
    assert threading.active_count() == threads


def test_ranks_of_any_speed_meet(model, monkeypatch):
    """One reads slowly, another computes slowly, and they hold on to nothing."""
    path, blocks, contents = model
    wrong = []

    class Slow(FileReader):
        def read(self, extents, buffer):
            time.sleep(0.005)
            super().read(extents, buffer)

    def work(seat):
        reader = Slow(path) if seat.rank == 1 else None
        with BlockStream(path, blocks, CPU, passes=2, slots=2, reader=reader, neighbours=seat) as stream:
            for _ in range(2):
                for index, (weights, _) in enumerate(stream.blocks()):
                    time.sleep(0.005 * (seat.rank == 2))
                    compare(blocks[index], weights, contents[index], False, wrong)

    assert on_all(3, work, Meeting(3)) == [None] * 3 and not wrong


@pytest.mark.parametrize("ring", ["host", "cuda"])
@pytest.mark.parametrize("failing", range(0, 2 * BLOCKS, 5))
def test_a_rank_that_cannot_read_says_so_and_the_others_that_it_is_gone(model, monkeypatch, cuda, ring, failing):
    path, blocks, _ = model
    stand_in, threads = cuda() if ring == "cuda" else None, threading.active_count()

    class Broken(FileReader):
        count = itertools.count()

        def read(self, extents, buffer):
            if next(self.count) == failing:
                raise SkyrunError("the disk is broken")
            super().read(extents, buffer)

    def work(seat):
        reader = Broken(path) if seat.rank == 1 else None
        with BlockStream(path, blocks, CPU, passes=2, reader=reader, neighbours=seat) as stream:
            for _ in range(2):
                for _ in stream.blocks():
                    pass

    first, second = on_all(2, work, Meeting(2, stand_in))
    assert isinstance(first, Gone) and second.message == "the disk is broken"
    assert threading.active_count() == threads and (stand_in is None or not stand_in.registered)


@pytest.mark.parametrize("ring", ["host", "cuda"])
def test_a_rank_that_stops_waits_for_nobody(model, cuda, ring):
    """It has started to gather the next block, which others may never do. Only the device may wait for that."""
    path, blocks, _ = model
    stand_in, threads = cuda() if ring == "cuda" else None, threading.active_count()
    waited = []

    class First:
        """A gathering of which only the first comes to an end."""

        rank, near, numbers = 0, range(2), itertools.count()

        def complete(self, parts):
            self.number = next(self.numbers)
            return SimpleNamespace(wait=partial(self.wait, self.number))

        def wait(self, number):
            work = partial(waited.append, number)
            stand_in.current_stream().enqueue(work) if stand_in else work()

    neighbours = First()
    with pytest.raises(KeyboardInterrupt), BlockStream(path, blocks, CPU, neighbours=neighbours) as stream:
        next(stream.blocks())
        raise KeyboardInterrupt
    assert neighbours.number == 1 and 1 not in waited
    assert threading.active_count() == threads
    assert stand_in is None or stand_in.default.work[-1].args == (1,)  # what uses the memory next waits for it
