"""Worker processes, one for each device: start them, speak with them, end them. Torch's elastic launcher does it."""

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, start_processes

from skyrun.errors import FAILED, OutOfMemory, SkyrunError
from skyrun.parallel.messages import Channel, Door

BEAT = 1.0  # seconds between signs of life of a worker
_SILENT = 30  # of these may be missing, then it hangs
_MEET = 120.0  # seconds for workers to start: they import torch
_CAUSE = 3.0  # seconds in which the cause follows what it has caused
_REST = 0.5  # seconds for what rank 0 has said before that
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)

Messages = queue.SimpleQueue[tuple[int, Any]]  # of the rank that says it


@dataclass(frozen=True)
class Failure:
    """What a worker says when it fails.

    primary: whether it was the cause, not another worker that was lost. stage: in which memory ran out, so that the
    message is what refused it; None if something else failed.
    """

    message: str
    hint: str
    code: int
    primary: bool
    stage: str | None = None


@dataclass(frozen=True)
class Beat:
    """A sign of life."""


@dataclass(frozen=True)
class Interruption:
    """What ends the messages."""


@dataclass(frozen=True)
class Done:
    """What a worker says when it has done what it was sent. value: what it returns."""

    value: Any


class Team:
    """Workers 0 to size - 1, which run a module of this package. What they are to do is sent to them.

    They start with the first thing that they are sent, and again with the first after their end. All end when this
    process does. Where one has failed, the others cannot go on: close the team then.

    module: what they run, with the type of the device as its argument and their rank in the environment. first: the
    number of the first device. of: how many workers share the machine, if there are those of other teams.
    """

    def __init__(self, size: int, module: str, device: str, first: int = 0, of: int = 0) -> None:
        self.size, self._first, self._sharing = size, first, max(of, size)
        self._module, self._device = module, device
        self._messages: Messages = queue.SimpleQueue()
        self._channels: dict[int, Channel] = {}
        self._processes: PContext | None = None

    def _start(self) -> None:
        self._messages, self._channels = queue.SimpleQueue(), {}
        self._door = Door()
        # With it the workers find each other, as those of torchrun do.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environments = [self._environment(rank) for rank in range(self.size)]
        try:
            self._processes = _started(self._module, [self._device], environments)
        except BaseException:
            self._door.close()
            raise
        self._pids = self._processes.pids()
        hands = (self._door, self._channels, self._messages)
        threading.Thread(target=self._accept, args=hands, name="accept workers", daemon=True).start()

    def _environment(self, rank: int) -> dict[str, str]:
        threads = max(1, (psutil.cpu_count(logical=False) or 1) // self._sharing) if self._device == "cpu" else None
        return {
            **({"OMP_NUM_THREADS": str(threads)} if threads and "OMP_NUM_THREADS" not in os.environ else {}),
            **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),  # it is all on this machine
            "RANK": str(rank),
            "LOCAL_RANK": str(self._first + rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is that of this process
            **self._door.environment,
        }

    def _accept(self, door: Door, channels: dict[int, Channel], messages: Messages) -> None:
        with suppress(OSError, EOFError):
            for _ in range(self.size):
                channel = door.accept()
                rank = channel.receive()
                channels[rank] = channel
                hands = (rank, channel, messages)
                threading.Thread(target=_read, args=hands, name=f"worker {rank}", daemon=True).start()

    def send(self, *values: Any) -> None:
        """Send values to the workers, one to each, or the only one to all. Raises SkyrunError if one has ended."""
        if self._processes is None:
            self._start()
        self._meet()
        for rank, channel in sorted(self._channels.items()):
            try:
                channel.send(values[rank % len(values)])
            except OSError:
                self._messages.put((rank, None))

    def _meet(self) -> None:
        """Wait until all workers are there. Raises SkyrunError if one has ended before."""
        until = time.monotonic() + _MEET
        while len(self._channels) < self.size:
            for rank, pid in self._pids.items():
                if not _runs(pid):
                    raise self._failure(rank, self._last_words(rank))
            if time.monotonic() > until:
                raise SkyrunError(f"the workers did not start within {_MEET:.0f} s", "see what they print", FAILED)
            time.sleep(0.02)

    def _last_words(self, rank: int) -> Failure | None:
        """What a worker that has ended has said of its end."""
        with suppress(queue.Empty):
            while True:
                speaker, message = self._messages.get(timeout=1.0)
                if speaker == rank and (message is None or isinstance(message, Failure)):
                    return message
        return None

    def messages(self) -> Iterator[tuple[int, Any]]:
        """What the workers say, in order, with the rank of each. Raises SkyrunError for what ends them, OutOfMemory
        where memory runs out, and KeyboardInterrupt after `interrupt`.

        If a worker fails because another one was lost, that other one's message is waited for: it is the cause.
        """
        ended: dict[int, Failure | None] = {}  # what those have said that have ended
        while True:
            try:
                rank, message = self._messages.get(timeout=_CAUSE)
            except queue.Empty:
                if ended:
                    raise self._failure(*next(iter(ended.items()))) from None
                continue
            if isinstance(message, Interruption):
                raise KeyboardInterrupt
            if message is None or isinstance(message, Failure):
                cause = ended.setdefault(rank, message)  # the end comes after what was said about it
                if cause is None or cause.primary:
                    yield from self._rest() if 0 not in ended else ()
                    raise self._failure(rank, cause)
            else:
                yield rank, message

    def _rest(self) -> Iterator[tuple[int, Any]]:
        """What rank 0 has said before it meets the failure of another one: it may have finished something."""
        until = time.monotonic() + _REST
        with suppress(queue.Empty):
            while (left := until - time.monotonic()) > 0:
                rank, message = self._messages.get(timeout=left)
                if rank == 0 and (message is None or isinstance(message, (Failure, Interruption))):
                    return
                if rank == 0:
                    yield rank, message

    def _failure(self, rank: int, message: Failure | None) -> SkyrunError:
        who = f"device {self._first + rank}"
        if message is not None and message.stage is not None:
            return OutOfMemory(message.message, message.stage, self._first + rank if self.size > 1 else None)
        if message is not None:
            return SkyrunError(
                f"{who}: {message.message}" if self.size > 1 else message.message, message.hint, message.code
            )
        code = self._exit_code(rank)
        if code is not None and -code == _KILL:
            hint = "the system ends processes when memory is short: see --max-ram, or close other programs"
            return SkyrunError(f"the worker of {who} was killed (signal {-code})", hint, FAILED)
        how = "ended" if code is None else f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return SkyrunError(f"the worker of {who} {how} without a message", "see what it printed above", FAILED)

    def _exit_code(self, rank: int) -> int | None:
        """The exit code of a worker that has closed its channel; None if it cannot be told."""
        with suppress(Exception):
            process = self._processes.subprocess_handlers[rank].proc  # type: ignore[union-attr]
            return int(process.wait(5.0))
        return None

    def interrupt(self) -> None:
        """End the messages. Any thread may ask for it."""
        self._messages.put((0, Interruption()))

    def close(self) -> None:
        """End all workers now."""
        if self._processes is None:
            return
        self._door.close()
        self._processes.close(_KILL, timeout=5)  # so that all channels end
        self._processes = None


def _read(rank: int, channel: Channel, messages: Messages) -> None:
    """Put what a worker says into the queue. Its end is None; where it is silent for too long, it is ended."""
    silent = 0
    try:
        while True:
            if not channel.is_ready(BEAT):
                silent += 1
                if silent >= _SILENT:
                    hint = "see what else the machine does; what is finished is kept"
                    failure = Failure(f"did not answer for {_SILENT * BEAT:.0f} s", hint, FAILED, True)
                    messages.put((rank, failure))
                    return
                continue
            silent = 0
            if not isinstance(message := channel.receive(), Beat):
                messages.put((rank, message))
    except (OSError, EOFError):
        messages.put((rank, None))
    finally:
        channel.close()


def _started(module: str, arguments: Sequence[str], environments: list[dict[str, str]]) -> PContext:
    """Start the module with every environment."""
    # torch's launcher says a lot where it ends processes, and takes over signals if it is on the main thread.
    for name in ("api", "subprocess_handler.subprocess_handler"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    started: list[PContext] = []
    ranks, is_over = range(len(environments)), threading.Event()

    def start() -> None:
        try:
            started.append(
                start_processes(
                    "skyrun",
                    sys.executable,
                    {rank: ("-m", module, *arguments) for rank in ranks},
                    dict(zip(ranks, environments, strict=True)),
                    DefaultLogsSpecs(os.devnull),
                )
            )
        finally:
            is_over.set()

    threading.Thread(target=start).start()
    try:
        is_over.wait()
    except BaseException:  # Ctrl-C: the launcher's threads would keep this process from ending
        is_over.wait()
        for processes in started:
            processes.close(_KILL, timeout=5)
        raise
    if not started:
        raise SkyrunError("the workers cannot be started", "see the messages above", FAILED)
    return started[0]


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
