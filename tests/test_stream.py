"""Blocks arrive whole, in order, ahead of time, and only a few at a time."""

import errno
import gc
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from skyrun.errors import SkyrunError
from skyrun.kernels import FORMATS
from skyrun.kernels.files.gguf_file import TensorInfo, open_gguf
from skyrun.quant import quantize
from skyrun.streaming.layout import lay_out
from skyrun.streaming.stream import BlockStream, FileReader, spread
from skyrun.streaming.weights import Weights, as_weight

CPU = torch.device("cpu")
BLOCKS, NUMBERS = 12, 5000


@pytest.fixture
def model(tmp_path):
    """A file of twelve blocks, stored in a shuffled order with strangers in between, and where they lie."""
    path, blocks = tmp_path / "blocks.bin", {}
    order = np.random.default_rng(3).permutation(BLOCKS)
    with open(path, "wb") as file:
        for index in order:
            tensors = {}
            for name in ("a.weight", "b.weight"):
                data = np.full(NUMBERS, index, np.float32)
                info = TensorInfo(name, (NUMBERS,), FORMATS["F32"], file.tell(), data.nbytes)
                file.write(data.tobytes())
                file.write(bytes(96 if index % 2 else 1 << 17))  # a small gap is read over, a large one is not
                tensors[name] = info
            blocks[int(index)] = lay_out(tensors)
    return path, [blocks[index] for index in range(BLOCKS)]


def values(weights):
    return float(weights.dense("a.weight").mean()), float(weights.dense("b.weight").mean())


@pytest.mark.parametrize("resident", [0, 1, 5, BLOCKS])
@pytest.mark.parametrize("slots", [2, 3, 5])
def test_every_pass_gives_every_block_in_order(model, slots, resident):
    path, blocks = model
    kept = spread(resident, BLOCKS)
    assert len(kept) == resident
    with BlockStream(path, blocks, CPU, passes=3, slots=slots, resident=kept) as stream:
        for _ in range(3):
            assert [values(weights) for weights, _ in stream.blocks()] == [(n, n) for n in range(BLOCKS)]
    passing = [block.nbytes for index, block in enumerate(blocks) if index not in kept]
    assert stream.stats.bytes_read == sum(block.nbytes for block in blocks) + 2 * sum(passing)


def test_extents_skip_large_gaps(model):
    _, blocks = model
    assert [len(block.extents) for block in blocks] == [2, 1] * (BLOCKS // 2)
    assert blocks[0].nbytes < 2 * NUMBERS * 4 + 64


def live_buffers():
    """Memory blocks of a block's size or more that any tensor holds, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        dense = type(thing) is torch.Tensor and thing.layout == torch.strided
        if dense and thing.untyped_storage().nbytes() >= 2 * NUMBERS * 4:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return found


@pytest.mark.parametrize("resident", [0, 4])
def test_at_most_three_blocks_are_in_memory_besides_those_kept(model, resident):
    path, blocks = model
    before = set(live_buffers())
    with BlockStream(path, blocks, CPU, passes=2, resident=spread(resident, BLOCKS)) as stream:
        seen = 0
        for turn in range(2):
            for index, (weights, _) in enumerate(stream.blocks()):
                values(weights)
                if turn or index > 3:
                    seen = max(seen, len(set(live_buffers()) - before))
                del weights
    assert seen == 3 + resident
    assert set(live_buffers()) <= before


class Watched(FileReader):
    """Says how many blocks have been read."""

    def __init__(self, path):
        super().__init__(path)
        self.count = threading.Semaphore(0)

    def read(self, block, buffer):
        super().read(block, buffer)
        self.count.release()


def test_the_next_block_is_read_while_one_computes(model):
    path, blocks = model
    reader, clocks = Watched(path), []
    with BlockStream(path, blocks, CPU, reader=reader) as stream:
        assert reader.count.acquire(timeout=60)
        for index, (_, clock) in enumerate(stream.blocks()):
            if index + 1 < BLOCKS:
                assert reader.count.acquire(timeout=60)  # the next one arrives without being asked for
            clocks.append(clock.done())
    for this, following in zip(clocks, clocks[1:], strict=False):
        assert following.read_start <= this.compute_end


def test_reading_wraps_into_the_next_pass(model):
    path, blocks = model
    reader = Watched(path)
    with BlockStream(path, blocks, CPU, passes=2, reader=reader) as stream:
        for _ in stream.blocks():
            pass
        for _ in range(BLOCKS + 1):
            assert reader.count.acquire(timeout=60)  # the first block of the next pass too


def test_a_reader_that_fails_fails_the_model(model):
    path, blocks = model
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with BlockStream(path, blocks, CPU) as stream, pytest.raises(SkyrunError, match="ended at byte"):
        for _ in stream.blocks():
            pass


def cut(path):
    os.truncate(path, 1000)


def rewrite(path):
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(1, 1))  # clocks of file systems are coarse


def replace(path):
    other = path.with_name("other.bin")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "ended at byte|changed from .* to 1000 bytes"),
        (rewrite, "written to|changed from|ended at byte"),  # it may be seen while it is being written
        (replace, "replaced by another file"),
    ],
)
def test_a_file_that_changes_while_it_is_streamed(model, change, message):
    path, blocks = model
    before = threading.active_count()
    with BlockStream(path, blocks, CPU, slots=2, passes=2) as stream, pytest.raises(SkyrunError, match=message):
        for index, _ in enumerate(stream.blocks()):
            if index == 0:
                change(path)
    assert threading.active_count() == before


@pytest.mark.parametrize("resident", [0, BLOCKS])
@pytest.mark.parametrize("fault", ["short reads", "refused", "broken disk", "slow disk"])
def test_faults_of_the_disk(model, monkeypatch, fault, resident):
    path, blocks = model
    before, count = threading.active_count(), itertools.count()

    def preadv(file, buffers, offset, read=os.preadv):
        if fault == "refused" and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if fault == "broken disk" and next(count) > 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault == "slow disk":
            time.sleep(0.005)
        got = read(file, buffers, offset)
        return min(got, 4321) if fault == "short reads" else got

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(os, "preadv", preadv)
    reader = FileReader(path, direct=fault == "refused")
    failing = pytest.raises(SkyrunError, match="Input/output error") if fault == "broken disk" else nullcontext()
    kept = spread(resident, BLOCKS)
    with BlockStream(path, blocks, CPU, passes=2, resident=kept, reader=reader) as stream, failing:
        for _ in range(2):
            assert [values(weights) for weights, _ in stream.blocks()] == [(n, n) for n in range(BLOCKS)]
    assert threading.active_count() == before


STREAMING = """
import sys
from pathlib import Path
import torch
from skyrun.kernels import FORMATS
from skyrun.kernels.files.gguf_file import TensorInfo
from skyrun.streaming.stream import BlockStream
from skyrun.streaming.layout import lay_out

path, count, nbytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
infos = [TensorInfo("w", (nbytes // 4,), FORMATS["F32"], index * nbytes, nbytes) for index in range(count)]
blocks = [lay_out({"w": info}) for info in infos]
print("ready", flush=True)
sys.stdin.readline()
with BlockStream(path, blocks, torch.device("cpu"), passes=2) as stream:
    for _ in range(2):
        for weights, _ in stream.blocks():
            assert float(weights["w"].sum()) == 0
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of another process is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """240 MB pass through a ring of 18, seen from outside."""
    path, count, nbytes, peaks = tmp_path / "zeros.bin", 40, 6 << 20, []
    with open(path, "wb") as file:
        file.truncate(count * nbytes)
    command = [sys.executable, "-c", STREAMING, str(path), str(count), str(nbytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for expected in ("ready", "done"):
            assert process.stdout.readline().strip() == expected
            status = Path(f"/proc/{process.pid}/status").read_text()
            peaks.append(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]))
            print("", file=process.stdin, flush=True)
    assert 3 * nbytes <= peaks[1] - peaks[0] < 8 * nbytes


def test_closing_early_ends_the_thread(model):
    path, blocks = model
    before = threading.active_count()
    for _ in range(20):
        with BlockStream(path, blocks, CPU, passes=100) as stream:
            next(stream.blocks())
    assert threading.active_count() == before


def test_closing_early_does_not_read_what_would_have_been_kept(model):
    class Gated(Watched):
        gate = threading.Event()

        def read(self, block, buffer):
            super().read(block, buffer)
            self.gate.wait(60)

    path, blocks = model
    reader = Gated(path)
    stream = BlockStream(path, blocks, CPU, resident=frozenset(range(BLOCKS)), reader=reader)
    assert reader.count.acquire(timeout=60)
    closing = threading.Thread(target=stream.close)
    closing.start()
    while not stream._closed:
        time.sleep(0.001)
    reader.gate.set()
    closing.join(60)
    assert not reader.count.acquire(blocking=False)


def test_weights_that_other_tools_quantize_are_decoded():
    numbers = torch.linspace(-1, 1, 64)
    data = quantize(numbers[None], "Q8_0").flatten()
    info = TensorInfo("x.bias", (64,), FORMATS["Q8_0"], 0, len(data))
    matrix = TensorInfo("x.weight", (64, 32), FORMATS["F32"], 0, 64 * 32 * 4)
    zeros = torch.zeros(matrix.nbytes, dtype=torch.uint8)
    weights = Weights("x", {"x.bias": as_weight(data, info), "x.weight": as_weight(zeros, matrix)})
    assert weights.dense("x.bias").shape == (64,)
    torch.testing.assert_close(weights.linear("x", torch.ones(32)), numbers, atol=0.01, rtol=0)


def test_a_slow_reader_is_waited_for(model):
    class Slow(FileReader):
        def read(self, block, buffer):
            time.sleep(0.01)
            super().read(block, buffer)

    path, blocks = model
    with BlockStream(path, blocks, CPU, reader=Slow(path)) as stream:
        assert [values(weights)[0] for weights, _ in stream.blocks()] == list(range(BLOCKS))
    assert stream.stats.stall_seconds > 0


@pytest.mark.parametrize(("count", "total"), [(0, 40), (1, 40), (13, 40), (40, 40)])
def test_resident_blocks_are_spread_evenly(count, total):
    kept = sorted(spread(count, total))
    assert len(kept) == count
    gaps = np.diff([*kept, kept[0] + total]) if kept else [0]
    assert max(gaps) - min(gaps) <= 1


def test_model_files_have_one_extent_per_block(converted):
    from skyrun.models.dit_header import block_layouts

    file = open_gguf(next(converted("Q4_K").glob("SkyReels*.gguf")))
    blocks = block_layouts(file)
    assert [len(block.extents) for block in blocks] == [1, 1]
    assert blocks[0].extents[0].offset + blocks[0].nbytes <= blocks[1].extents[0].offset


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("resident", [0, 5, BLOCKS])
def test_blocks_arrive_whole_on_a_gpu(model, resident):
    path, blocks = model
    device = torch.device("cuda")
    with BlockStream(path, blocks, device, passes=20, resident=spread(resident, BLOCKS)) as stream:
        for _ in range(20):
            totals = [weights.dense("a.weight").sum() for weights, _ in stream.blocks()]
            torch.cuda._sleep(100000)
            assert [float(total) / NUMBERS for total in totals] == list(range(BLOCKS))
