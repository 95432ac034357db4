"""The folder of a model that a command names, fetched first where it is not there."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from skyrun.device import choose_device
from skyrun.download import Pull, carry_out, check_space, planned_pull
from skyrun.errors import SkyrunError
from skyrun.inputs import open_inputs
from skyrun.progress import progress
from skyrun.pulled import Name, is_complete, parse_name, pulled
from skyrun.request import Request
from skyrun.sources import SOURCES

Say = Callable[[str], None]


def obtain(name: Name, say: Say, out: Path | None = None, dry_run: bool = False) -> Pull:
    """Fetch a model, as far as it is not there, after saying what and how large it is; or only say so."""
    with planned_pull(name, out, dry_run) as pull:
        say(pull.text())
        check_space(pull)
        if pull.parts and not dry_run:
            try:
                with progress() as display:
                    carry_out(pull, display)
            except KeyboardInterrupt:
                say(f"what has arrived is kept in {pull.folder}: run the same command again to go on from there")
                raise
        return pull


def located(request: Request, model: str | None, say: Say, dry_run: bool = False) -> tuple[Request, Pull | None]:
    """The request with the place of its model: a path, or a name, by default that of the task.

    A model that is not there is fetched; of a dry run the second value is then what would be.
    """
    if model is not None and (Path(model).exists() or not _is_name(model)):
        return replace(request, model=Path(model)), None
    name = parse_name(model or request.task, request.quant)
    found = pulled(name)
    if found and is_complete(*found[0]):
        return replace(request, model=found[0][0], quant=None), None
    failures: list[SkyrunError] = []
    open_inputs(request, failures)  # better before the download than after it
    if failures:
        raise failures[0]
    choose_device(request.device)
    if found:
        name = replace(name, quant=found[0][1].quant)
    state = f"{name} is not there{' as a whole' if found else ''}:"
    say(f"no model was given, and {state}" if model is None else state)
    pull = obtain(name, say, dry_run=dry_run)
    return replace(request, model=pull.folder, quant=None), pull if dry_run else None


def _is_name(text: str) -> bool:
    """Whether it cannot be meant as a path: OWNER/NAME has to have a type behind it here."""
    return text in SOURCES or ":" in text and not Path(text).is_absolute()
