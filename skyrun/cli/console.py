"""What is printed: text for people on stderr, values on stdout, both escaped, and neither able to end a run."""

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
    """Make stdin, stdout and stderr safe to use: open, and able to take every character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed; the next file would get its number, and what is printed by libraries
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 -- for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Give up what cannot be written: the interpreter would complain about it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def log_details() -> None:
    """Write what happens inside to stderr."""
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
    """Text for people. Where nobody can read it the run goes on."""
    with suppress(OSError, ValueError):
        print(_fitted(text, sys.stderr), file=sys.stderr, flush=True)


def display(text: str) -> None:
    """Text that was asked for, on stdout."""
    print(_fitted(text, sys.stdout), flush=True)


def emit(value: dict[str, Any]) -> None:
    """A line of JSON, which escapes by itself."""
    print(json.dumps(value), flush=True)


def show_error(error: "SkyrunError", as_json: bool) -> None:
    """What went wrong, and what to do next."""
    if as_json:
        with suppress(OSError):
            emit({"event": "error", "message": error.message, "hint": error.hint, "code": error.code})
    say(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
    log.debug("the error was raised here", exc_info=error)


def _fitted(text: str, stream: TextIO) -> str:
    """Escaped; on a terminal, long lines are broken between words."""
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
