"""Print text on stderr and values on stdout, both escaped. A failed write never ends a run."""

import io
import json
import logging
import os
import shutil
import sys
import textwrap
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from skyrun.units import printable

if TYPE_CHECKING:
    from skyrun.errors import SkyrunError

log = logging.getLogger("skyrun")


def open_streams() -> None:
    """Make sure that stdin, stdout and stderr are open and can print every character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed; the next file would get its descriptor, and the output of libraries
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 -- stays open as long as the process runs
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Drop output that cannot be written, so that the interpreter does not report it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def log_details() -> None:
    """Log details to stderr."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Escaped("%(asctime)s %(name)s: %(message)s"))
        handler.handleError = lambda record: None  # type: ignore[method-assign]
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)


class _Escaped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def say(text: str = "") -> None:
    """Print text for people on stderr. If that fails, the run goes on."""
    with suppress(OSError, ValueError):
        print(_fitted(text, sys.stderr), file=sys.stderr, flush=True)


def display(text: str) -> None:
    """Print requested text on stdout."""
    print(_fitted(text, sys.stdout), flush=True)


def emit(value: dict[str, Any]) -> None:
    """Print a value as one line of JSON on stdout."""
    print(json.dumps(value), flush=True)


def show_error(error: "SkyrunError", as_json: bool) -> None:
    """Print an error and its hint."""
    if as_json:
        with suppress(OSError):
            emit({"event": "error", "message": error.message, "hint": error.hint, "code": error.code})
    say(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
    log.debug("the error was raised here", exc_info=error)


def _fitted(text: str, stream: TextIO) -> str:
    """Escape text; for a terminal, also wrap long lines at words."""
    text = printable(text)
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(_wrapped(line, width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())] + "  "
    return "\n".join(
        textwrap.wrap(
            line,
            width,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        )
    )
