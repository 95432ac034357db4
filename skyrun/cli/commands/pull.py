"""`skyrun pull`: fetch a model, and convert it while it arrives if needed."""

import shlex
from argparse import Namespace

from skyrun.cli.console import emit, say
from skyrun.cli.progress import shown
from skyrun.hub.pull import pull
from skyrun.hub.store import parse_name


def execute(arguments: Namespace) -> int:
    """Fetch a model, or say what would be fetched."""
    name = parse_name(arguments.model, arguments.quant, arguments.task)
    fetched = shown(pull(name, arguments.output, arguments.dry_run), False)
    if not arguments.dry_run:
        say(f"{fetched.folder}: ready, for skyrun run ... --model {shlex.quote(str(arguments.output or fetched.name))}")
    if arguments.json:
        emit({"event": "plan" if arguments.dry_run else "result"} | fetched.as_json())
    return 0
