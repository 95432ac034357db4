"""Being told to stop: Ctrl-C, a closed terminal, a request to end. None may be lost or leave a file half-written."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# SIGHUP and SIGTERM are what closing a terminal and `kill` send; Windows has no SIGHUP.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


_INTERRUPTED = 130
_asked = False


class Interrupted(Exception):
    """The user asked to stop."""


def raise_if_asked() -> None:
    """Raise the KeyboardInterrupt again that was raised where no exception gets out of, such as a finalizer."""
    if _asked:
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted for whatever exception leaves the body after such a signal.

    A library in C may turn the KeyboardInterrupt that is raised in it into an error of its own. A second Ctrl-C does
    not wait for what is being saved: it ends the process.
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
    if threading.current_thread() is threading.main_thread():  # only there can signals be handled
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup and & ignore some on purpose
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
    """Nothing is cleaned up: what a killed run leaves is what the next run finds."""
    with suppress(OSError):  # a print could wait for the one that was interrupted
        shown_cursor = b"\x1b[?25h\n" if os.isatty(2) else b""
        os.write(2, shown_cursor + b"ended at once: what was not saved yet is lost\n")
    os._exit(_INTERRUPTED)
