"""Parse the arguments, run one command, return an exit code. Nothing here imports torch."""

import os
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from skyrun.cli.parser import parser
from skyrun.cli.signals import Interrupted, interruptible
from skyrun.errors import INTERRUPTED

_FACES = {"web": "skyrun.web.command"}  # commands that are faces of their own, found by their names as the others are


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code, the code of the SkyrunError that ended it, or 130 if it was interrupted."""
    from skyrun.cli.console import close_streams, emit, open_streams, say

    open_streams()
    arguments = parser().parse_args(argv)
    if arguments.command is None:
        parser().print_help()
        return 0
    try:
        with interruptible():
            return _run(arguments)
    except Interrupted:
        say("interrupted: no file was left half-written under its name")
        if arguments.json:
            with suppress(OSError, ValueError):
                emit({"event": "error", "message": "interrupted", "hint": "", "code": INTERRUPTED})
        return INTERRUPTED
    finally:
        close_streams()


def _run(arguments: Namespace) -> int:
    from skyrun.cli.console import log_details, say, show_error
    from skyrun.errors import FAILED, SkyrunError

    if arguments.verbose:
        log_details()
    try:
        _apply_config(arguments)
        command = import_module(_FACES.get(arguments.command, f"skyrun.cli.commands.{arguments.command}"))
        return int(command.execute(arguments))
    except SkyrunError as error:
        show_error(error, arguments.json)
        return error.code
    except BrokenPipeError:
        say("error: the reader of the output has closed it")
        return FAILED
    except OSError as error:
        show_error(SkyrunError(str(error), "check the path, its permissions and free space", FAILED), arguments.json)
        return FAILED


def _apply_config(arguments: Namespace) -> None:
    """Fill in the user's defaults for options that are not given."""
    from skyrun.planning.config import read_config
    from skyrun.tasks import TASKS

    config = read_config()
    if config.models is not None:
        os.environ.setdefault("SKYRUN_MODELS", config.models)
    if arguments.command == "pull" or (arguments.command == "run" and arguments.model is None):
        arguments.quant = arguments.quant or config.quant
    if arguments.command not in ("run", "plan") or arguments.task is None:  # --from takes these from the earlier clip
        return
    arguments.prefer = arguments.prefer or config.prefer
    if arguments.resolution is arguments.size is None and config.resolution in TASKS[arguments.task].resolutions:
        arguments.resolution = config.resolution
