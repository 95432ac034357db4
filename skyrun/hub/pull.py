"""Fetch a model by name: decide which files, check the space, fetch and convert, go on where it was interrupted."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from skyrun.cli.progress import Display, progress
from skyrun.errors import FAILED, SkyrunError
from skyrun.hub.client import arrived
from skyrun.hub.resolve import Chooser, Part, default_quant
from skyrun.hub.store import Manifest, Name, folder_of, is_complete, parse_name, pulled
from skyrun.kernels.disk import allocated, existing_folder
from skyrun.planning.inputs import open_inputs
from skyrun.planning.problems import check
from skyrun.planning.request import Request
from skyrun.streaming.device import choose_device
from skyrun.tasks.sources import SOURCES
from skyrun.units import size

_WORK = ".fetched"


@dataclass(frozen=True)
class Pull:
    """What will be fetched. parts: those that are not done yet."""

    name: Name
    quant: str
    folder: Path
    manifest: Manifest
    parts: tuple[Part, ...]

    @property
    def fetch_bytes(self) -> int:
        """Bytes of the files to be fetched, whatever of them is there."""
        return sum(file.nbytes for part in self.parts for file in part.places.values())

    @property
    def here_bytes(self) -> int:
        """How many of those are on the disk."""
        places = [pair for part in self.parts for pair in part.places.items()]
        return sum(arrived(file, place) for place, file in places)

    @property
    def result_bytes(self) -> int:
        """Bytes that stay, of what is not done yet."""
        return sum(sum(part.results.values()) for part in self.parts)

    @property
    def peak_bytes(self) -> int:
        """The most that is on the disk at once, of what is not done yet."""
        peak = before = 0
        for part in self.parts:
            before += sum(part.results.values())
            peak = max(peak, before + part.passing_bytes)
        return peak

    def as_json(self) -> dict[str, Any]:
        """The decisions as plain values."""
        return {
            "model": str(self.name),
            "quant": self.quant,
            "folder": str(self.folder),
            "repositories": self.manifest.commits,
            "fetch_bytes": self.fetch_bytes,
            "result_bytes": self.result_bytes,
            "disk_bytes": self.peak_bytes,
            "files": [{"path": f.path, "bytes": f.nbytes} for part in self.parts for f in part.places.values()],
        }

    def text(self) -> str:
        """What will be fetched, from where, how large it is, and what stays."""
        if not self.parts:
            return f"{self.name}: all files are in {self.folder}"
        origin = ", ".join(f"{repo} at {commit[:12]}" for repo, commit in self.manifest.commits.items())
        lines = [f"{self.name.stem}, {self.quant}, from {origin}"]
        for part in self.parts:
            lines += [f"  {what}" + (f"  {size(nbytes)}" if nbytes else "") for what, nbytes in part.text()]
        here = f", of which {size(self.here_bytes)} are here" if self.here_bytes else ""
        about = "about " * any("" in part.results for part in self.parts)
        lines.append(
            f"{size(self.fetch_bytes)} to fetch{here}; {about}{size(self.result_bytes)} stay in {self.folder}; "
            f"{about}{size(self.peak_bytes)} of disk are needed on the way"
        )
        return "\n".join(lines)


@contextmanager
def planned_pull(name: Name, out: Path | None = None, dry_run: bool = False) -> Iterator[Pull]:
    """Decide what to fetch, and keep other processes out of the folder until that is done.

    Reads lists and headers, and keeps small files; nothing large is fetched, and with `dry_run` nothing is written.
    out: the folder of the model, where it is not to be one among the others.
    """
    quant = name.quant or default_quant(name)
    folder = out or folder_of(name, quant)
    manifest = Manifest.read(folder)
    if manifest is None or (manifest.name, manifest.quant) != (name.stem, quant):
        manifest = Manifest(name.stem, quant)
    if is_complete(folder, manifest):
        yield Pull(name, quant, folder, manifest, ())
        return
    _check_folder(folder)
    with TemporaryDirectory(prefix="skyrun-") if dry_run else _alone(folder) as work:
        parts = Chooser(name, quant, folder, Path(work), manifest).parts()
        left = [part for part in parts if not _is_done(part, folder, manifest)]
        left.sort(key=lambda part: -part.passing_bytes)
        yield Pull(name, quant, folder, manifest, tuple(left))


def _is_done(part: Part, folder: Path, manifest: Manifest) -> bool:
    """Whether its files are written, be it that the process ended before it could put that on record."""
    on_record = all(manifest.finished(folder, key) for key in part.keys)
    whole = all(name in manifest.begun and (folder / name).is_file() for name in part.results)
    if whole and not on_record:
        manifest.done |= dict.fromkeys(part.keys, list(part.results))
    return on_record or whole


def check_space(pull: Pull) -> None:
    """SkyrunError if the disk cannot hold what the pull needs on the way."""
    existing = existing_folder(pull.folder)
    free, there = shutil.disk_usage(existing).free, _allocated(pull)
    needed = pull.peak_bytes - there
    if needed > free:
        raise SkyrunError(
            f"{pull.name} needs {size(needed)} more of disk, and {existing} has {size(free)} free",
            "free some space, choose a smaller --quant, or set SKYRUN_MODELS to a folder on a larger disk",
            FAILED,
        )


def _check_folder(folder: Path) -> None:
    existing = existing_folder(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "read-only" if existing.is_dir() else "a file"
        hint = "choose another folder with -o, or set SKYRUN_MODELS"
        raise SkyrunError(f"cannot write to the folder {folder}: {existing} is {what}", hint)


def _allocated(pull: Pull) -> int:
    """Bytes that unfinished files take on the disk already."""
    unfinished = [*(pull.folder / _WORK).rglob("*"), *pull.folder.glob("*.part"), *pull.folder.glob("*.partial")]
    return sum(allocated(path) for path in unfinished if path.is_file())


def carry_out(pull: Pull, display: Display) -> None:
    """Fetch and convert. What is done is done for good: after an interruption the same pull goes on."""
    for part in pull.parts:
        pull.manifest.begun = [name for name in part.results if name and not (pull.folder / name).exists()]
        pull.manifest.write(pull.folder)
        written = [path.name for path in part.run(display)]
        pull.manifest.done |= dict.fromkeys(part.keys, written)
        pull.manifest.begun = []
        pull.manifest.write(pull.folder)
        part.clean()
    pull.manifest.complete = True
    pull.manifest.write(pull.folder)
    shutil.rmtree(pull.folder / _WORK, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """The folder of what passes through. SkyrunError if another process fetches into it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        message = f"another skyrun fetches into {folder}"
        raise SkyrunError(message, "wait for it, then run the same command again", FAILED) from error
    try:
        yield folder / _WORK
    finally:
        lock.release()
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [".lock"]:
                shutil.rmtree(folder)


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
    check(request)
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
