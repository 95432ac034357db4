"""Text for people goes to stderr, values for scripts to stdout."""

import json
import sys
from typing import Any

from skyrun.kernels.errors import SkyrunError


def say(text: str = "") -> None:
    """A line for people."""
    print(text, file=sys.stderr)


def emit(value: dict[str, Any]) -> None:
    """A line of JSON."""
    print(json.dumps(value), flush=True)


def show_error(error: SkyrunError, as_json: bool) -> None:
    """What went wrong, and what to do next."""
    if as_json:
        emit({"event": "error", "message": error.message, "hint": error.hint, "code": error.code})
    say(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
