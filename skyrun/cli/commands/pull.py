"""`skyrun pull`: fetch a model, and convert it as it arrives where that is needed."""

import shlex
from argparse import Namespace

from skyrun.cli.console import emit, say
from skyrun.hub.pull import obtain
from skyrun.hub.store import parse_name


def execute(arguments: Namespace) -> int:
    """Fetch a model, or say what would be fetched."""
    pull = obtain(parse_name(arguments.model, arguments.quant), say, arguments.output, arguments.dry_run)
    if not arguments.dry_run:
        say(f"{pull.folder}: ready, for skyrun run ... --model {shlex.quote(str(arguments.output or pull.name))}")
    if arguments.json:
        emit({"event": "plan" if arguments.dry_run else "result"} | pull.as_json())
    return 0
