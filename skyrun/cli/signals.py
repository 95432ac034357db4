"""Handle Ctrl-C, a closed terminal and SIGTERM, so that none is lost or leaves a half-written file."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Closing a terminal sends SIGHUP, `kill` sends SIGTERM; Windows has no SIGHUP.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


_INTERRUPTED = 130
_asked = False


class Interrupted(Exception):
    """The user asked to stop."""


def raise_if_asked() -> None:
    """Raise KeyboardInterrupt again if it was lost, for example in a finalizer."""
    if _asked:
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted for any exception that leaves the block after a signal.

    C libraries may turn a KeyboardInterrupt into an error of their own. A second Ctrl-C ends the process at once, even
    while the state is saved.
    """
    global _asked
    _asked = False

    def ask(number: int, _frame: FrameType | None) -> None:
        global _asked
        if _asked and number == signal.SIGINT:
            _end_now()
        _asked = True
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread can handle signals
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup and & ignore some signals on purpose
                before[number] = signal.signal(number, ask)
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted from stop
    except Exception as error:
        if _asked:
            raise Interrupted from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_now() -> None:
    """End the process without cleaning up; the next run resumes as after a kill."""
    with suppress(OSError):  # print could wait for an interrupted print
        shown_cursor = b"\x1b[?25h\n" if os.isatty(2) else b""
        os.write(2, shown_cursor + b"ended at once: what was not saved yet is lost\n")
    os._exit(_INTERRUPTED)
