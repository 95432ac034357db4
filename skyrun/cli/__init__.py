"""The command line: arguments in, events of the engine shown, an exit code out."""

from skyrun.cli.main import main

__all__ = ["main"]
