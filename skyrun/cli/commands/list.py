"""`skyrun list`: list the models that were fetched."""

from argparse import Namespace
from datetime import datetime

from skyrun.cli.console import display, emit, say
from skyrun.hub.store import models_folder, stored
from skyrun.units import size, table


def execute(arguments: Namespace) -> int:
    """Print name, type, size, last use and origin of each model."""
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
    display(table(rows))
    return 0
