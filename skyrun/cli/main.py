"""Arguments in, one command called, an exit code out. Nothing here imports torch."""

import argparse
import os
import sys
from collections.abc import Sequence

from skyrun.cli.parser import parser
from skyrun.cli.signals import Interrupted, interruptible

_INTERRUPTED = 130  # as skyrun.errors has it, which would import numpy


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, the code of the SkyrunError that ended it, or 130 if interrupted."""
    arguments = parser().parse_args(argv)
    try:
        with interruptible():
            return _run(arguments)
    except Interrupted:
        print("interrupted: no file was left half-written under its name", file=sys.stderr)
        return _INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    from skyrun.cli.commands import all as commands
    from skyrun.cli.console import show_error
    from skyrun.errors import FAILED, SkyrunError

    try:
        return int(getattr(commands, arguments.command)(arguments))
    except SkyrunError as error:
        show_error(error, arguments.json)
        return error.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: whoever read the output has gone", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"error: {error}\nhint: check the path, its permissions and free space", file=sys.stderr)
        return FAILED
