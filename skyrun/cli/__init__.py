"""The command line: parse arguments, show the events of the engine, return an exit code."""

from skyrun.cli.main import main

__all__ = ["main"]
