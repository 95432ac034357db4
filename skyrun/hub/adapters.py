"""Adapters (LoRA) that are named as OWNER/NAME/FILE: find them among the models, or fetch them from the hub."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.events import Event, Notice
from skyrun.hub.store import models_folder
from skyrun.planning.lora import Lora
from skyrun.units import size

_FOLDER = "adapters"  # among the models


def fetch_adapters(loras: Sequence[Lora], dry_run: bool = False) -> Generator[Event, None, tuple[Lora, ...]]:
    """The same adapters as files on this machine. Those that are not here yet are fetched.

    Raises SkyrunError if the hub does not have one. dry_run: only say what would be fetched, and leave it out.
    """
    found = []
    for lora in loras:
        named = lora.on_hub
        place = lora.path if named is None else _place(*named)
        if named is not None and not place.is_file():
            fetched = yield from _fetch(*named, place, dry_run)
            if not fetched:
                continue
        found.append(replace(lora, path=place))
    return tuple(found)


def found_adapters(loras: Sequence[Lora]) -> tuple[Lora, ...]:
    """The same adapters, those that were fetched before as files on this machine."""
    places = [(lora, _place(*lora.on_hub) if lora.on_hub is not None else lora.path) for lora in loras]
    return tuple(replace(lora, path=place) if place.is_file() else lora for lora, place in places)


def _place(repo: str, path: str) -> Path:
    return models_folder() / _FOLDER / repo.replace("/", "--") / path


def _fetch(repo: str, path: str, place: Path, dry_run: bool) -> Generator[Event, None, bool]:
    """Fetch a file. Returns whether it is there now."""
    from skyrun.hub.client import fetch, list_repository  # files that are here do not need the hub

    try:
        files = list_repository(repo).files
    except SkyrunError as error:  # it may be a path with a mistake in it
        told = f"there is no file {repo}/{path} on this machine, and on the hub: {error.message}"
        raise SkyrunError(told, error.hint, error.code) from error
    file = next((file for file in files if file.path == path), None)
    if file is None:
        there = [file.path for file in files if file.path.endswith(".safetensors")]
        has = f"it has {', '.join(there[:5])}" if there else "it has no safetensors file"
        raise SkyrunError(f"there is no file {repo}/{path}, neither on this machine nor on the hub", has, MODEL_MISSING)
    if dry_run:
        yield Notice(f"{repo}/{path} would be fetched first, {size(file.nbytes)}")
        return False
    yield from fetch(file, place)
    return True
