"""`skyrun remove`: delete a model that was fetched."""

from argparse import Namespace

from skyrun.cli.console import emit, say
from skyrun.hub.store import remove
from skyrun.units import size


def execute(arguments: Namespace) -> int:
    """Delete a model by its name."""
    model = remove(arguments.name)
    if arguments.json:
        emit({"event": "result"} | model.as_json())
    else:
        say(f"{model.name} is removed: {size(model.nbytes)} in {model.folder}")
    return 0
