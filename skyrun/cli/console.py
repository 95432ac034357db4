"""Text for people goes to stderr, values for scripts to stdout."""

import json
import sys
from typing import Any


def say(text: str = "") -> None:
    """A line for people."""
    print(text, file=sys.stderr)


def emit(value: dict[str, Any]) -> None:
    """A line of JSON."""
    print(json.dumps(value), flush=True)
