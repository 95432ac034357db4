"""`skyrun resume`: finish a clip whose run ended early."""

from argparse import Namespace

from skyrun.cli.commands.run import announce, make, pictures_of
from skyrun.cli.launched import launched
from skyrun.engine.output import clip_path, state_path
from skyrun.engine.resume import resume


def execute(arguments: Namespace) -> int:
    """Load the state of the clip and finish it."""
    return launched(arguments, _execute)


def _execute(arguments: Namespace) -> int:
    names = ("device", "devices", "max_vram", "max_ram")
    changes = {name: getattr(arguments, name) for name in names} | {"overwrite": arguments.overwrite or None}
    output = clip_path(state_path(arguments.file))
    job, state = resume(arguments.file, pictures_of(output, arguments), **changes)
    announce(job, state, arguments.json)
    make(job, state, arguments)
    return 0
