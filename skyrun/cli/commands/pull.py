"""`skyrun pull`: fetch a model, and convert it while it arrives if needed."""

import shlex
from argparse import Namespace

from skyrun.cli.console import emit, say
from skyrun.cli.progress import shown
from skyrun.errors import SkyrunError
from skyrun.hub.pull import pull
from skyrun.hub.store import parse_name
from skyrun.tasks.sources import BUILT_IN


def execute(arguments: Namespace) -> int:
    """Fetch a model, or say what would be fetched."""
    name = parse_name(arguments.model, arguments.quant, arguments.task)
    if name.repo in BUILT_IN:
        raise SkyrunError(f"{name} comes with skyrun, there is nothing to fetch", f"use it: --model {name}")
    fetched = shown(pull(name, arguments.output, arguments.dry_run), False)
    if not arguments.dry_run:
        say(f"{fetched.folder}: ready, for skyrun run ... --model {shlex.quote(str(arguments.output or fetched.name))}")
    if arguments.json:
        emit({"event": "plan" if arguments.dry_run else "result"} | fetched.as_json())
    return 0
