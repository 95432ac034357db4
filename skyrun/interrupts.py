"""Ctrl-C that is not lost: libraries in C may turn a KeyboardInterrupt into an error of their own."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The user asked to stop."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted for whatever exception leaves the body after a Ctrl-C."""
    asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()  # only there can signals be handled
    before = signal.signal(signal.SIGINT, ask) if here else None
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted from stop
    except Exception as error:
        if asked:
            raise Interrupted from error
        raise
    finally:
        if here:
            signal.signal(signal.SIGINT, before)
