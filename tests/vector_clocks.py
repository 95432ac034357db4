"""A stand-in for CUDA that proves an order instead of trying one: every access to memory gets a vector clock.

Threads of the host and streams of the device are actors. What an actor knows to be done when it begins an access is a
clock: for every actor, how many of its accesses. Events, waits, queues, futures and threads hand clocks on. Two
accesses to the same bytes, one of them a write, are in order if one knows of the other; otherwise they race, whatever
order they had in this run.
"""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Known = dict[Any, int]  # accesses that are known to be done, by actor
Range = tuple[int, int]  # addresses


def joined(into: Known, other: Known) -> None:
    for actor, count in other.items():
        into[actor] = max(into.get(actor, 0), count)


def range_of(tensor: Tensor) -> Range:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@dataclass(frozen=True)
class Access:
    """number: of the actor's accesses, from 1 on. known: when it began."""

    actor: Any
    number: int
    known: Known
    writes: bool
    place: Range
    what: str

    def knows(self, other: "Access") -> bool:
        return self.actor == other.actor or self.known.get(other.actor, 0) >= other.number


class Clocks:
    """All accesses, and what each thread of the host knows. As `cuda` it has what skyrun uses of torch.cuda."""

    def __init__(self) -> None:
        self.accesses: list[Access] = []
        self.kept: list[Any] = []  # tensors, so that no address is used twice
        self.lock, self._mine = threading.RLock(), threading.local()
        self._numbers, self._host = itertools.count(), []
        clocks = self

        class OwnStream(Stream):
            def __init__(self, *_: Any) -> None:
                super().__init__(clocks)

        class OwnEvent(Event):
            def __init__(self, blocking: bool = False) -> None:
                super().__init__(clocks)

        self.Stream, self.Event = OwnStream, OwnEvent
        self.default = OwnStream()

    @property
    def known(self) -> Known:
        """What this thread knows."""
        if not hasattr(self._mine, "known"):
            self._mine.known, self._mine.actor = {}, f"thread {next(self._numbers)}"
        return self._mine.known

    def on_host(self, what: str, reads: tuple[Tensor, ...] = (), writes: tuple[Tensor, ...] = ()) -> None:
        """This thread accesses memory now."""
        known = self.known
        with self.lock:
            actor = self._mine.actor
            self._record(actor, dict(known), what, reads, writes)
            known[actor] = known.get(actor, 0) + 1

    def on_stream(self, what: str, reads: tuple[Tensor, ...] = (), writes: tuple[Tensor, ...] = ()) -> None:
        """The current stream will access memory."""
        stream = self.current_stream()
        with self.lock:
            joined(stream.known, self.known)
            self._record(stream, dict(stream.known), what, reads, writes)
            stream.known[stream] = stream.known.get(stream, 0) + 1

    def _record(self, actor: Any, known: Known, what: str, reads: Any, writes: Any) -> None:
        self.kept += [*reads, *writes]
        for is_write, tensors in ((False, reads), (True, writes)):
            for tensor in tensors:
                place = range_of(tensor)
                self.accesses.append(Access(actor, known.get(actor, 0) + 1, known, is_write, place, what))

    def races(self) -> set[tuple[str, str]]:
        """What races with what."""
        found, ordered = set(), sorted(self.accesses, key=lambda access: access.place)
        for index, one in enumerate(ordered):
            for other in itertools.islice(ordered, index + 1, None):
                if other.place[0] >= one.place[1]:
                    break
                if (one.writes or other.writes) and not one.knows(other) and not other.knows(one):
                    found.add(tuple(sorted((one.what, other.what))))
        return found

    def is_host(self, tensor: Tensor) -> bool:
        start, end = range_of(tensor)
        return any(first <= start and end <= last for first, last in self._host)

    def register(self, tensor: Tensor) -> Tensor:
        """Memory of the host; all other memory is the device's."""
        self.kept.append(tensor)
        self._host.append(range_of(tensor))
        return tensor

    # torch.cuda

    def current_stream(self, device: Any = None) -> "Stream":
        return getattr(self._mine, "stream", self.default)

    @contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        before = self.current_stream()
        self._mine.stream = stream
        yield
        self._mine.stream = before

    def cudart(self) -> Any:
        return SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: None)


class Stream:
    def __init__(self, clocks: Clocks) -> None:
        self.clocks, self.known = clocks, {}

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: "Event") -> None:
        with self.clocks.lock:
            joined(self.known, event.known)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or self.clocks.Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    def __init__(self, clocks: Clocks) -> None:
        self.clocks, self.known = clocks, {}

    def record(self, stream: Stream) -> None:
        with self.clocks.lock:
            self.known = dict(stream.known)

    def synchronize(self) -> None:
        with self.clocks.lock:
            joined(self.clocks.known, self.known)


class Copies(TorchDispatchMode):
    """Copies are accesses: of the thread between two places of the host, of the current stream otherwise."""

    def __init__(self, clocks: Clocks) -> None:
        super().__init__()
        self._clocks = clocks

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            target, source = args[:2]
            here = self._clocks.is_host(target) and self._clocks.is_host(source)
            access = self._clocks.on_host if here else self._clocks.on_stream
            access("copy on the host" if here else "copy", (source,), (target,))
        return function(*args, **(kwargs or {}))


@contextmanager
def followed(clocks: Clocks, *modules: Any) -> Iterator[None]:
    """Meanwhile the modules' queues, executors and threads hand clocks on, and copies of all threads are accesses."""

    class Queue(SimpleQueue):  # type: ignore[type-arg]
        def put(self, item: Any) -> None:
            super().put((dict(clocks.known), item))

        def get(self, *arguments: Any) -> Any:
            known, item = super().get(*arguments)
            joined(clocks.known, known)
            return item

        def get_nowait(self) -> Any:
            return self.get(False)

    class Executor(ThreadPoolExecutor):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.submitted: list[Any] = []

        def submit(self, work: Any, *arguments: Any, **keywords: Any) -> Any:
            begun, done = dict(clocks.known), {}

            def run() -> Any:
                joined(clocks.known, begun)
                try:
                    return work(*arguments, **keywords)
                finally:
                    joined(done, clocks.known)

            future = super().submit(run)
            for name in ("result", "exception"):
                setattr(future, name, waiting(getattr(future, name), done))
            future.known = done
            self.submitted.append(future)
            return future

        def shutdown(self, *arguments: Any, **keywords: Any) -> None:
            super().shutdown(*arguments, **keywords)
            for future in self.submitted:
                joined(clocks.known, future.known)

    def waiting(wait: Any, done: Known) -> Any:
        def waited(*arguments: Any) -> Any:
            try:
                return wait(*arguments)
            finally:
                joined(clocks.known, done)

        return waited

    class Thread(threading.Thread):
        def start(self) -> None:
            self.begun, self.ended = dict(clocks.known), {}
            super().start()

        def run(self) -> None:
            joined(clocks.known, self.begun)
            super().run()
            joined(self.ended, clocks.known)

        def join(self, timeout: float | None = None) -> None:
            super().join(timeout)
            joined(clocks.known, self.ended)

    run = threading.Thread.run

    def watched(thread: threading.Thread) -> None:
        with Copies(clocks):
            run(thread)

    stand_ins = {"SimpleQueue": Queue, "ThreadPoolExecutor": Executor}
    patches = [patch.object(m, name, one) for m in modules for name, one in stand_ins.items() if hasattr(m, name)]
    patches += [
        patch.object(m, "threading", SimpleNamespace(**{**vars(threading), "Thread": Thread}))
        for m in modules
        if hasattr(m, "threading")
    ]
    with patch.object(threading.Thread, "run", watched), Copies(clocks):
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()
