"""A worker process, one for each device: python -m skyrun.engine.worker cuda|cpu

It is started by parallel.team, with its rank in the environment, does what it is sent, and ends with the process that
has started it, which keeps what is finished. Ctrl-C is that one's.
"""

import os
import signal
import sys
import threading
import time
import traceback
from queue import SimpleQueue
from typing import Any, NoReturn

from skyrun.errors import FAILED, OutOfMemory, SkyrunError
from skyrun.kernels.machine.failures import is_out_of_memory
from skyrun.parallel.group import PeerLost, joined
from skyrun.parallel.messages import Channel, entered
from skyrun.parallel.team import BEAT, Beat, Done, Failure
from skyrun.streaming.device import choose_device, out_of_memory


class Worker:
    """The main thread works; others listen and give signs of life."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._orders: SimpleQueue[Any] = SimpleQueue()

    def run(self, rank: int, size: int, local: int, device: str) -> int:
        """Do what arrives until something fails. Returns the exit code."""
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()
        try:
            with joined(rank, size, choose_device(f"cuda:{local}" if device == "cuda" else device)) as group:
                while True:
                    self._channel.send(Done(self._orders.get()(group, self._channel.send)))
        except BaseException as error:
            failure = _failure(error)
            self._channel.send(failure)
            return failure.code

    def _listen(self) -> NoReturn:
        """Hand on what is to be done. When the process that has started this one is gone, end at once."""
        while True:
            try:
                self._orders.put(self._channel.receive())
            except (OSError, EOFError):
                os._exit(FAILED)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            self._channel.send(Beat())


def _failure(error: BaseException) -> Failure:
    told = explained(error)
    if isinstance(told, OutOfMemory):
        return Failure(told.cause, told.hint, told.code, True, told.stage)
    return Failure(told.message, told.hint, told.code, not isinstance(told, PeerLost))


def explained(error: BaseException) -> SkyrunError:
    """What a user is told of an error that ends a clip."""
    if isinstance(error, SkyrunError):
        return error
    if is_out_of_memory(error):
        return out_of_memory(error)
    if isinstance(error, OSError):
        return SkyrunError(str(error), "check the path, its permissions and free space", FAILED)
    traceback.print_exc()
    told = f"it failed with an error that it should not have: {type(error).__name__}: {error}"
    return SkyrunError(told, "the message above has the details", FAILED)


def main(device: str) -> int:
    """Work as the environment says. Returns the exit code."""
    os.dup2(2, 1)  # the output is that of the process that has started this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = entered()
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    channel.send(rank)
    return Worker(channel).run(rank, size, local, device)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    os._exit(code)  # without waiting for what other ranks have left unfinished
