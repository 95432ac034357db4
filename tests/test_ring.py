"""Pieces of blocks pass through a few buffers on the host, are laid out there, and come together on the device.

Without a GPU a stand-in for CUDA runs copies when something waits for them, at the latest possible moment.
"""

import itertools
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from blocks import random_blocks

from skyrun.kernels import FORMATS, QuantizedWeight
from skyrun.kernels.files.gguf_file import TensorInfo
from skyrun.kernels.planes import needs_planes, to_planes
from skyrun.models.vae_memory import Memory
from skyrun.presets import memory
from skyrun.streaming import ring as module
from skyrun.streaming import staging
from skyrun.streaming import stream as stream_module
from skyrun.streaming.layout import lay_out
from skyrun.streaming.reader import FileReader
from skyrun.streaming.ring import CudaRing, HostRing
from skyrun.streaming.stream import BlockStream, spread
from skyrun.streaming.weights import has_planes

CPU = torch.device("cpu")
BLOCKS = 6
# name, type, shape: as in real files, small tensors lie between large ones, and types are mixed
TENSORS = [
    ("q.weight", "Q8_0", (40, 256)),
    ("q.bias", "F32", (40,)),
    ("k.weight", "Q4_K", (24, 512)),
    ("k.bias", "F32", (24,)),
    ("norm.weight", "F32", (256,)),
    ("v.weight", "Q6_K", (24, 512)),
    ("odd.weight", "Q5_0", (3, 32)),
    ("vector.weight", "Q8_0", (64,)),
    ("ffn.weight", "Q3_K", (64, 256)),
    ("table.weight", "F16", (100, 30)),
]


@pytest.fixture
def model(tmp_path):
    """A file of blocks in reverse order, where they lie, and the bytes of every tensor."""
    path, blocks, contents = tmp_path / "blocks.bin", [], []
    torch.manual_seed(0)
    with open(path, "wb") as file:
        for index in reversed(range(BLOCKS)):
            infos, content = {}, {}
            for place, (name, type, shape) in enumerate(TENSORS):
                format = FORMATS[type]
                if format.block_size > 1:
                    data = random_blocks(type, shape[0] if len(shape) == 2 else 1, shape[-1]).flatten()
                else:
                    data = torch.randn(shape).to(torch.float16 if type == "F16" else torch.float32)
                    data = data.view(torch.uint8).flatten()
                file.write(bytes(-file.tell() % 32))
                if index == 2 and place == 5:
                    file.write(bytes(1 << 17))  # a block in two extents
                infos[name] = TensorInfo(name, shape, format, file.tell(), data.numel())
                content[name] = data
                file.write(data.numpy().tobytes())
            blocks.append(lay_out(infos))
            contents.append(content)
    return path, blocks[::-1], contents[::-1]


def expected_bytes(info, data, planar):
    if planar and has_planes(info):
        return to_planes(data.view(info.shape[0], -1), info.format.name).flatten()
    return data


def bytes_of(weight):
    return weight.data.flatten() if isinstance(weight, QuantizedWeight) else weight.view(torch.uint8).flatten()


def compare(block, weights, content, planar, wrong):
    """What a kernel would see of a block."""
    for _, info, _ in block.tensors:
        if len(info.shape) == 2:  # others are decoded when they are looked up, on the device
            expected = expected_bytes(info, content[info.name], planar)
            if not torch.equal(bytes_of(weights[info.name]), expected):
                wrong.append(info.name)


class Delayed:
    """A stream of CUDA whose work is done when somebody waits for it."""

    lock = threading.RLock()  # of all streams: work of one waits for work of others

    def __init__(self, *_):
        self.work, self.done = [], 0

    def enqueue(self, action):
        with self.lock:
            self.work.append(action)
            return len(self.work)

    def run(self, count):
        with self.lock:
            while self.done < count:
                self.done += 1
                self.work[self.done - 1]()

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def wait_event(self, event):
        position = (event.stream, event.count)
        self.enqueue(lambda: position[0].run(position[1]) if position[0] else None)

    def record_event(self, event=None):
        event = event or DelayedEvent()
        event.record(self)
        return event

    def synchronize(self):
        self.run(len(self.work))


class DelayedEvent:
    def __init__(self, blocking=False):
        self.stream, self.count = None, 0

    def record(self, stream):
        self.count, self.stream = len(stream.work), stream

    def synchronize(self):
        if self.stream:
            self.stream.run(self.count)


class Target:
    """Memory of the device: copies into it are enqueued."""

    def __init__(self, tensor, cuda):
        self.tensor, self.cuda = tensor, cuda

    def __getitem__(self, part):
        return Target(self.tensor[part], self.cuda)

    def copy_(self, source, non_blocking):
        assert non_blocking
        self.cuda.current_stream().enqueue(torch.inference_mode()(lambda: self.tensor.copy_(source)))


class StandIn:
    """As much of torch.cuda as a ring uses. refusals: how many registrations of memory fail."""

    Stream, Event = Delayed, DelayedEvent

    def __init__(self, refusals=0):
        self.refusals, self.registered, self.sizes = refusals, {}, []
        self.default, self.mine = Delayed(), threading.local()

    def current_stream(self, device=None):
        return getattr(self.mine, "stream", self.default)

    def stream(self, stream):
        cuda = self

        class Entered:
            def __enter__(self):
                cuda.mine.stream = stream

            def __exit__(self, *_):
                del cuda.mine.stream

        return Entered()

    def cudart(self):
        return SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.registered.pop)

    def register(self, address, nbytes, flags):
        assert address % 4096 == nbytes % 4096 == 0 and flags == 1
        self.sizes.append(nbytes)
        if len(self.sizes) <= self.refusals:
            return 2
        self.registered[address] = nbytes
        return 0


@pytest.fixture
def cuda(monkeypatch):
    """cuda(refusals) puts a stand-in in CUDA's place, for rings in host memory."""

    def install(refusals=0):
        stand_in = StandIn(refusals)
        for place in (module, staging):
            monkeypatch.setattr(place, "torch", SimpleNamespace(**{**vars(torch), "cuda": stand_in}))

        class Ring(CudaRing):
            def send(self, moves, slot):
                return super().send([(Target(to, stand_in), source) for to, source in moves], slot)

        monkeypatch.setattr(stream_module, "make_ring", Ring)
        return stand_in

    return install


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("ring", ["host", "cuda", "little page-locked memory", "no page-locked memory"])
@pytest.mark.parametrize("piece", [8192, 12288, 1 << 20])
def test_pieces_come_together(model, monkeypatch, cuda, ring, piece, planar):
    path, blocks, contents = model
    monkeypatch.setattr(memory, "_PIECE", piece)
    monkeypatch.setattr(stream_module, "uses_triton", lambda device: planar)
    monkeypatch.setattr(HostRing, "staged", True)
    refusals = {"host": 0, "cuda": 0, "little page-locked memory": 2, "no page-locked memory": 3}[ring]
    stand_in = None if ring == "host" else cuda(refusals)
    threads, wrong = threading.active_count(), []
    for resident, slots in ((0, 2), (2, 3), (BLOCKS, 2)):
        with BlockStream(path, blocks, CPU, passes=3, slots=slots, resident=spread(resident, BLOCKS)) as stream:
            for _ in range(3):
                for index, (weights, _) in enumerate(stream.blocks()):
                    kernel = partial(compare, blocks[index], weights, contents[index], planar, wrong)
                    stand_in.default.enqueue(kernel) if stand_in else kernel()
            if stand_in:
                stand_in.default.synchronize()
        assert not wrong
        if stand_in:
            assert len(stand_in.sizes) == min(refusals + 1, 3) and not stand_in.registered
            stand_in.sizes.clear()
    assert threading.active_count() == threads


def test_types_of_the_model_above_cover_both_layouts():
    types = {type for _, type, shape in TENSORS if len(shape) == 2 and FORMATS[type].block_size > 1}
    assert {needs_planes(type) for type in types} == {True, False}


def test_small_tensors_are_read_together(model):
    _, blocks, _ = model
    plain = blocks[0].runs(planar=False)
    assert [(piece.offset, piece.nbytes) for piece in plain] == [(e.offset, e.nbytes) for e in blocks[0].extents]
    assert len(blocks[2].extents) == len(blocks[2].runs(planar=False)) == 2
    apart = [piece.info.name if piece.info else None for piece in blocks[0].runs(planar=True)]
    assert apart == ["q.weight", None, "v.weight", "odd.weight", None, "ffn.weight", None]


@pytest.mark.parametrize(("refusals", "pieces", "locked"), [(0, 8, True), (1, 4, True), (2, 2, True), (3, 2, False)])
def test_page_locked_memory_has_the_size_that_there_is(cuda, refusals, pieces, locked):
    stand_in = cuda(refusals)
    ring = CudaRing(CPU, 2, 0, 10_000)
    assert ring.piece_bytes == 16384
    assert list(stand_in.registered.values()) == [pieces * 16384] * locked
    buffers = set()
    for _ in range(2 * pieces):
        with ring.staging() as staged:
            buffers.add(staged.data_ptr())
            assert staged.nbytes == 16384
    assert len(buffers) == pieces
    ring.close()
    ring.close()
    assert not stand_in.registered


def test_the_plan_counts_what_a_ring_takes(cuda):
    stand_in = cuda()
    CudaRing(CPU, 2, 0, 100 << 20).close()
    (locked,) = stand_in.sizes
    assert locked == 256 << 20
    assert memory.staging_bytes(100 << 20) == locked + memory.LOADERS * (32 << 20)
    assert memory.staging_bytes(0) == 0


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 5 * 4096 - 1])
def test_parked_bytes_go_to_the_device_and_back(cuda, monkeypatch, nbytes):
    stand_in = cuda()
    monkeypatch.setattr(staging, "PARKING_PIECE", 4096)
    parking, there = staging.Parking(CPU), torch.zeros(nbytes, dtype=torch.uint8)
    data, back = torch.randint(256, (nbytes,), dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    parking.fetch(data, there)
    assert torch.equal(there, data) and list(stand_in.registered.values()) == [2 * 4096]
    parking.store(there, back)
    assert torch.equal(back, data)
    parking.close()
    assert not stand_in.registered


def test_what_the_autoencoder_remembers_waits_in_ordinary_memory(cuda):
    stand_in = cuda()
    memory_of_layers = Memory(torch.device("cuda"), 0)
    frames = [torch.randn(2, 3, 4, 8).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    for index, of_layer in enumerate(frames):
        memory_of_layers.keep(of_layer, "layer", index)
    locked = memory.PARKING_PIECES * memory.PARKING_PIECE
    assert stand_in.sizes == [locked] and list(stand_in.registered.values()) == [locked]
    for index, of_layer in enumerate(frames):
        joined = torch.zeros(3, *of_layer.shape[1:], dtype=of_layer.dtype)
        memory_of_layers.recall(joined[:2], "layer", index)
        assert torch.equal(joined[:2], of_layer) and not joined[2].any()
    memory_of_layers.close()
    assert not stand_in.registered


def test_a_ring_that_cannot_be_made_leaves_nothing_open(model, monkeypatch):
    path, blocks, _ = model

    def refuse(*_):
        raise torch.OutOfMemoryError("no memory")

    closed = []
    monkeypatch.setattr(FileReader, "close", lambda self: closed.append(self))
    monkeypatch.setattr(stream_module, "make_ring", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        BlockStream(path, blocks, CPU)
    assert len(closed) == 1


@pytest.fixture
def places(cuda, monkeypatch):
    """The stand-in, and everything in a stream that may lack memory: functions by name, with their owners."""
    stand_in = cuda()
    monkeypatch.setattr(stream_module, "uses_triton", lambda device: True)
    owners = [(staging, "page_aligned"), (stream_module, "page_aligned"), (stream_module, "to_planes")]
    owners += [(stand_in, "Event"), (Target, "copy_"), (DelayedEvent, "record")]
    owners += [(Delayed, "synchronize"), (Delayed, "wait_event"), (FileReader, "_fill")]
    return stand_in, [(owner, name, getattr(owner, name)) for owner, name in owners]


def streamed(model):
    path, blocks, _ = model
    with BlockStream(path, blocks, CPU, passes=2, slots=2, resident=spread(2, BLOCKS)) as stream:
        for _ in range(2):
            for _ in stream.blocks():
                pass


def failing(work, fails, count):
    """The function, which counts its calls in `count` and lacks memory in those of `fails`."""

    def call(*arguments, **keywords):
        if next(count) in fails:
            raise torch.OutOfMemoryError
        return work(*arguments, **keywords)

    return call


def test_no_call_that_lacks_memory_leaves_anything_behind(model, monkeypatch, places):
    """Memory, copies, events and waits fail at their first, second and last call, in whichever thread makes it."""
    stand_in, functions = places
    threads, counts = threading.active_count(), [itertools.count() for _ in functions]
    for (owner, name, work), count in zip(functions, counts, strict=True):
        monkeypatch.setattr(owner, name, failing(work, (), count))
    streamed(model)
    for (owner, name, work), calls in zip(functions, [next(count) for count in counts], strict=True):
        assert calls, name
        for fails in sorted({0, min(1, calls - 1), calls - 1}):
            made = itertools.count()
            monkeypatch.setattr(owner, name, failing(work, (fails,), made))
            try:
                streamed(model)
            except torch.OutOfMemoryError:
                pass
            else:
                assert next(made) <= fails, "threads wait for each other a little less often in some runs"
            assert not stand_in.registered and threading.active_count() == threads, (name, fails)
        monkeypatch.setattr(owner, name, work)


def test_a_device_that_is_lost_hides_no_error_and_keeps_no_memory(model, places):
    """The first error is raised, or that of closing if there was none."""

    def lost(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    stand_in, _ = places
    path, blocks, _ = model
    closing = pytest.MonkeyPatch()
    for error, expected in ((ValueError("first"), "first"), (None, "illegal memory access")):
        with (
            pytest.raises((ValueError, RuntimeError), match=expected),
            BlockStream(path, blocks, CPU, resident=spread(BLOCKS, BLOCKS)) as stream,
        ):
            list(stream.blocks())
            closing.setattr(Delayed, "synchronize", lost)
            if error:
                raise error
        closing.undo()
        assert not stand_in.registered


def test_threads_work_on_the_device_of_the_stream(model, monkeypatch):
    """A new thread's device is the first GPU, and a stream that it enters would be left to that one again."""
    path, blocks, _ = model
    mine = threading.local()
    seen = set()

    class Ring(HostRing):
        staged = True

        def __init__(self, device, slots, kept, nbytes):
            super().__init__(slots, kept, nbytes)

        def send(self, moves, slot):
            seen.add(mine.device)
            super().send(moves, slot)

    second = torch.device("cuda", 1)
    monkeypatch.setattr(stream_module, "make_ring", Ring)
    monkeypatch.setattr(stream_module, "uses_triton", lambda device: False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(mine, "device", device))
    with BlockStream(path, blocks, second, slots=2, resident=spread(2, BLOCKS)) as stream:
        for _ in stream.blocks():
            pass
    assert seen == {second}
