"""Messages between a process and the workers that it has started: Python values, whole and in order.

Both ends are processes of one program that know the same secret, which came through the environment; nothing else can
write to the channel, so values travel as pickles.
"""

import os
import pickle
import secrets
import threading
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

_PLACE, _SECRET = "SKYRUN_TEAM", "SKYRUN_TEAM_SECRET"


class Channel:
    """One end. Any thread may send; one receives."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, value: Any) -> None:
        """Send a value. Raises OSError if the other end is gone."""
        data = pickle.dumps(value)
        with self._lock:
            self._connection.send_bytes(data)

    def receive(self) -> Any:
        """Wait for the next value. Raises EOFError or OSError when the other end is gone."""
        return pickle.loads(self._connection.recv_bytes())

    def is_ready(self, seconds: float) -> bool:
        """Whether a value, or the end, comes within that time."""
        return bool(self._connection.poll(seconds))

    def close(self) -> None:
        self._connection.close()


class Door:
    """Where workers meet the process that has started them."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._listener = Listener(None, backlog=64, authkey=self._secret)

    @property
    def environment(self) -> dict[str, str]:
        """What a worker must find in its environment."""
        return {_PLACE: str(self._listener.address), _SECRET: self._secret.hex()}

    def accept(self) -> Channel:
        """Wait for the next worker. Raises OSError when the door is closed."""
        return Channel(self._listener.accept())

    def close(self) -> None:
        self._listener.close()


def entered() -> Channel:
    """The channel of a worker to the process that has started it, whose secret leaves the environment with this."""
    return Channel(Client(os.environ.pop(_PLACE), authkey=bytes.fromhex(os.environ.pop(_SECRET))))
