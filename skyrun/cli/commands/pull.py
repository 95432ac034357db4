"""`skyrun pull`, `skyrun list` and `skyrun remove`: models are fetched, listed and deleted by name."""

import shlex
from argparse import Namespace
from collections.abc import Generator
from contextlib import suppress
from datetime import datetime
from typing import TypeVar

from skyrun.cli.console import emit, say
from skyrun.cli.progress import progress
from skyrun.cli.signals import raise_if_asked
from skyrun.events import Event
from skyrun.units import size, table

T = TypeVar("T")


def pull(arguments: Namespace) -> int:
    """Fetch a model, or say what would be fetched."""
    from skyrun.hub.pull import pull as fetch
    from skyrun.hub.store import parse_name

    name = parse_name(arguments.model, arguments.quant, arguments.task)
    pull = shown(fetch(name, arguments.output, arguments.dry_run))
    if not arguments.dry_run:
        say(f"{pull.folder}: ready, for skyrun run ... --model {shlex.quote(str(arguments.output or pull.name))}")
    if arguments.json:
        emit({"event": "plan" if arguments.dry_run else "result"} | pull.as_json())
    return 0


def shown(events: Generator[Event, None, T]) -> T:
    """Show what is said while something works that is not a clip, and return what comes of it."""
    try:
        with progress() as display:
            while True:
                try:
                    display.show(next(events))
                except StopIteration as stop:
                    value: T = stop.value
                    return value
                raise_if_asked()
    except BaseException as error:
        with suppress(BaseException):  # this one again, or what became of it
            events.throw(error)
        for note in getattr(error, "__notes__", ()):
            say(note)
        raise


def list_models(arguments: Namespace) -> int:
    """Say which models were fetched."""
    from skyrun.hub.store import models_folder, stored

    models = stored()
    if arguments.json:
        emit({"folder": str(models_folder()), "models": [model.as_json() for model in models]})
        return 0
    if not models:
        say(f"no model in {models_folder()}: skyrun pull NAME fetches one")
        return 0
    rows = [("name", "type", "size", "used", "from")]
    for model in models:
        used = datetime.fromtimestamp(model.used).strftime("%Y-%m-%d")
        state = size(model.nbytes) + ("" if model.complete else ", not complete")
        rows.append((model.name, model.quant, state, used, ", ".join(model.commits)))
    print(table(rows))
    return 0


def remove(arguments: Namespace) -> int:
    """Delete a model that was fetched."""
    from skyrun.hub.store import remove as delete

    model = delete(arguments.name)
    if arguments.json:
        emit({"event": "result"} | model.as_json())
    else:
        say(f"{model.name} is removed: {size(model.nbytes)} in {model.folder}")
    return 0
