"""Download a model by name: choose the files, check the disk space, download, convert, and resume."""

import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from skyrun.errors import FAILED, SkyrunError
from skyrun.events import Event, Notice
from skyrun.hub.client import arrived
from skyrun.hub.gguf_repo import roles_in
from skyrun.hub.manifest import Manifest
from skyrun.hub.part import Part
from skyrun.hub.resolve import Chooser, Main, needed_roles, planned_quant
from skyrun.hub.store import LOCK, WORK, Name, alone_in, folder_of, pulled
from skyrun.kernels.files.disk import allocated, existing_folder
from skyrun.planning.inputs import open_inputs
from skyrun.planning.problems import check
from skyrun.planning.request import Request
from skyrun.streaming.device import choose_device
from skyrun.units import size


@dataclass(frozen=True)
class Pull:
    """What will be downloaded. parts: those that are not done yet. saved_bytes: against the published checkpoint."""

    name: Name
    quant: str
    folder: Path
    manifest: Manifest
    parts: tuple[Part, ...]
    saved_bytes: int = 0

    @property
    def fetch_bytes(self) -> int:
        """Bytes of the files to download, including what has arrived of them."""
        return sum(file.nbytes for part in self.parts for file in part.places.values())

    @property
    def here_bytes(self) -> int:
        """How many of these bytes have arrived."""
        places = [pair for part in self.parts for pair in part.places.items()]
        return sum(arrived(file, place) for place, file in places)

    @property
    def result_bytes(self) -> int:
        """Bytes of the files that the parts become."""
        return sum(sum(part.results.values()) for part in self.parts)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that the parts take on the disk at any time."""
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
            "saved_bytes": self.saved_bytes,
            "files": [
                {"repository": file.repo, "path": file.path, "bytes": file.nbytes}
                for part in self.parts
                for file in part.places.values()
            ],
        }

    def text(self) -> str:
        """What will be downloaded, from where, how large it is, and what stays."""
        if not self.parts:
            return f"{self.name}: all files are in {self.folder}"
        origin = ", ".join(f"{repo} at {commit[:12]}" for repo, commit in self.manifest.commits.items())
        lines = [f"{self.name.repo or self.name.key}, {self.quant}, from {origin}"]
        for part in self.parts:
            lines += [f"  {what}" + (f"  {size(nbytes)}" if nbytes else "") for what, nbytes in part.text()]
        here = f", of which {size(self.here_bytes)} are here" if self.here_bytes else ""
        about = "about " * any("" in part.results for part in self.parts)
        lines.append(
            f"{size(self.fetch_bytes)} to fetch{here}; {about}{size(self.result_bytes)} stay in {self.folder}; "
            f"{about}{size(self.peak_bytes)} of disk are needed meanwhile"
        )
        if self.saved_bytes:
            lines.append(f"the published checkpoint would be {size(self.saved_bytes)} more to fetch")
        return "\n".join(lines)


def pull(name: Name, out: Path | None = None, dry_run: bool = False) -> Generator[Event, None, Pull]:
    """Download what is missing of a model. What it is and how large it is, is said first.

    Lists and headers are read before anything large is downloaded. After an interruption the same call resumes.

    Args:
        name: The name of the model.
        out: The folder of the model, if it is not to be one in the models folder.
        dry_run: Whether to stop after saying what would be downloaded. Nothing is written then.
    """
    folder, manifest, chooser, main = _decided(name, out)
    if main is None:
        pull = Pull(name, manifest.quant, folder, manifest, ())
        yield Notice(pull.text())
        return pull
    _check_folder(folder)
    with TemporaryDirectory(prefix="skyrun-") if dry_run else _alone(folder) as work:
        parts = chooser.parts(main, folder, Path(work))
        manifest.commits = chooser.commits
        left = [part for part in parts if not _is_done(part, folder, manifest)]
        left.sort(key=lambda part: -part.passing_bytes)
        pull = Pull(name, main.quant, folder, manifest, tuple(left))
        pull = replace(pull, saved_bytes=chooser.saved_bytes(main.task, parts))
        for note in chooser.notes:
            yield Notice(note)
        yield Notice(pull.text())
        check_space(pull)
        if dry_run:
            return pull
        try:
            yield from _carry_out(pull)
        except KeyboardInterrupt as stop:
            stop.add_note(f"what has arrived is kept in {folder}: run the same command again to go on from there")
            raise
    if missing := needed_roles(main.task) - roles_in(folder):
        names = ", ".join(sorted(role.replace("_", " ") for role in missing))
        yield Notice(f"{folder} has no {names}: not every clip can be made with it")
    return pull


def pull_for(request: Request, name: Name, named: bool = True, dry_run: bool = False) -> Generator[Event, None, Pull]:
    """Download the model of a clip. The inputs of the clip are checked first, because a download takes long.

    Args:
        request: The request of the clip.
        name: The name of the model.
        named: Whether the user named that model.
        dry_run: Whether to only say what would be downloaded.
    """
    check(request)
    failures: list[SkyrunError] = []
    open_inputs(request, failures)
    if failures:
        raise failures[0]
    choose_device(request.device)
    begun = pulled(name)
    if begun:
        name = replace(name, quant=begun[0][1].quant)
    state = f"{name} is not there{' as a whole' if begun else ''}:"
    yield Notice(state if named else f"no model was given, and {state}")
    return (yield from pull(name, dry_run=dry_run))


def _decided(name: Name, out: Path | None) -> tuple[Path, Manifest, Chooser, Main | None]:
    """The folder of the model, and where its transformer comes from; the latter is None if everything is there.

    If no type is named, it is known only after the repositories have been read.
    """
    wanted = name.quant or ("" if name.repo else planned_quant(name))
    begun = _begun(replace(name, quant=wanted), out)
    while True:
        folder, manifest = begun or (Path(), Manifest(name.stem, wanted))
        if begun:
            name = replace(name, quant=manifest.quant)
        chooser = Chooser(name, wanted, manifest.commits)
        if begun and manifest.is_whole(folder):
            return folder, manifest, chooser, None
        main = chooser.main()
        if begun:
            return folder, manifest, chooser, main
        begun = _begun(replace(name, quant=main.quant), out)
        if not begun:
            folder = out or folder_of(name, main.quant)
            return folder, Manifest(name.stem, main.quant, task=main.task), chooser, main


def _begun(name: Name, out: Path | None) -> tuple[Path, Manifest] | None:
    """The folder and the manifest of a model that is complete or was begun; None if there is none."""
    if out is None:
        return next(iter(pulled(name)), None) if name.quant else None
    manifest = Manifest.read(out)
    if manifest is None or manifest.name != name.stem or name.quant not in ("", manifest.quant):
        return None
    return out, manifest


def _is_done(part: Part, folder: Path, manifest: Manifest) -> bool:
    """Whether the files of a part are written, even if the process died before updating the manifest."""
    on_record = all(manifest.finished(folder, key) for key in part.keys)
    whole = all(name in manifest.begun and (folder / name).is_file() for name in part.results)
    if whole and not on_record:
        manifest.done |= dict.fromkeys(part.keys, list(part.results))
    return on_record or whole


def check_space(pull: Pull) -> None:
    """Raise SkyrunError if the disk has less space than the pull needs."""
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
    """Bytes that unfinished files already take on the disk."""
    unfinished = [*(pull.folder / WORK).rglob("*"), *pull.folder.glob("*.part"), *pull.folder.glob("*.partial")]
    return sum(allocated(path) for path in unfinished if path.is_file())


def _carry_out(pull: Pull) -> Generator[Event, None, None]:
    """Download and convert the parts, and update the manifest after each."""
    for part in pull.parts:
        pull.manifest.begun = [name for name in part.results if name and not (pull.folder / name).exists()]
        pull.manifest.write(pull.folder)
        written = yield from part.run()
        pull.manifest.done |= dict.fromkeys(part.keys, [path.name for path in written])
        pull.manifest.begun = []
        pull.manifest.write(pull.folder)
        part.clean()
    pull.manifest.complete = True
    pull.manifest.write(pull.folder)
    shutil.rmtree(pull.folder / WORK, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """Lock a folder and yield the subfolder for downloads. Raises SkyrunError if another process uses the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with alone_in(folder, f"another skyrun is downloading into {folder}"):
            yield folder / WORK
    finally:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder)
