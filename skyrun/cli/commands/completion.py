"""`skyrun completion`: print a script that completes commands and options in a shell."""

from argparse import Namespace

from shtab import complete

from skyrun.cli.parser import parser


def execute(arguments: Namespace) -> int:
    """Print the script of a shell."""
    print(complete(parser(), arguments.shell))
    return 0
