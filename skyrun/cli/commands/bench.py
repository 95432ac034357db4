"""`skyrun bench`: measure this machine."""

from argparse import Namespace

from skyrun.cli.console import emit, say
from skyrun.tools.bench import command


def execute(arguments: Namespace) -> int:
    """Run one of the benchmarks. Exit code 1 if a kernel is wrong."""
    return (command.kernels if arguments.what == "kernels" else command.step)(arguments, say, emit)
