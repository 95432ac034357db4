"""`skyrun completion`: a script that completes commands and options in a shell."""

from argparse import Namespace

from shtab import complete

from skyrun.cli.parser import parser


def execute(arguments: Namespace) -> int:
    """Print a shell's script."""
    print(complete(parser(), arguments.shell))
    return 0
