"""A worker process, one for each device: python -m skyrun.engine.worker cuda|cpu

It is started by parallel.team, with its rank in the environment, does what it is sent, and ends with the process that
has started it. Ctrl-C is that one's: it tells rank 0 to stop.
"""

import _thread
import os
import signal
import sys
import threading
import time
import traceback
from queue import SimpleQueue
from typing import Any

from skyrun.errors import FAILED, INTERRUPTED, SkyrunError
from skyrun.kernels.machine.failures import is_out_of_memory
from skyrun.parallel.group import PeerLost, joined
from skyrun.parallel.messages import Channel, entered
from skyrun.parallel.team import BEAT, Beat, Done, Failure, Stop
from skyrun.streaming.device import choose_device, out_of_memory


class Worker:
    """The main thread works; others listen and give signs of life."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._orders: SimpleQueue[Any] = SimpleQueue()
        self._stopped = False

    def run(self, rank: int, size: int, local: int, device: str) -> int:
        """Do what arrives until something fails. Returns the exit code."""
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()
        try:
            with joined(rank, size, choose_device(f"cuda:{local}" if device == "cuda" else device)) as self._group:
                while (order := self._orders.get()) is not None:
                    self._channel.send(Done(order(self._group, self._channel.send)))
            return 0
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already
            failure = self._failure(error)
            self._channel.send(failure)
            return failure.code

    def _failure(self, error: BaseException) -> Failure:
        if self._stopped or isinstance(error, KeyboardInterrupt):
            return Failure("interrupted", "", INTERRUPTED, True)
        if isinstance(error, SkyrunError):
            return Failure(error.message, error.hint, error.code, not isinstance(error, PeerLost))
        if is_out_of_memory(error):
            short = out_of_memory(error)
            return Failure(short.message, short.hint, short.code, True)
        if isinstance(error, OSError):
            return Failure(str(error), "check the path, its permissions and free space", FAILED, True)
        traceback.print_exc()
        told = f"it failed with an error that it should not have: {type(error).__name__}: {error}"
        return Failure(told, "the message above has the details", FAILED, True)

    def _listen(self) -> None:
        """Hand on what is to be done. When the process that has started this one is gone, end at once."""
        while True:
            try:
                message = self._channel.receive()
            except (OSError, EOFError):
                os._exit(FAILED)
            if not isinstance(message, Stop):
                self._orders.put(message)
                continue
            if self._stopped:
                continue  # a second interrupt would cut off what the first one saves
            self._stopped = True
            self._orders.put(None)
            _thread.interrupt_main(signal.SIGTERM)
            self._group.abandon()

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            self._channel.send(Beat())


def main(device: str) -> int:
    """Work as the environment says. Returns the exit code."""
    os.dup2(2, 1)  # the output is that of the process that has started this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    channel = entered()
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    channel.send(rank)
    return Worker(channel).run(rank, size, local, device)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    os._exit(code)  # without waiting for what other ranks have left unfinished
