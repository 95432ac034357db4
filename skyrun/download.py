"""Fetch a model by name: decide which files, check the space, fetch and convert, go on where it was interrupted."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from skyrun.arriving import fetch_shown, steps
from skyrun.errors import FAILED, SkyrunError
from skyrun.gguf_repository import RemoteModel, choose, look, quants
from skyrun.hub import RemoteFile, Repository, arrived, list_repository
from skyrun.progress import Display, size
from skyrun.pulled import Manifest, Name, folder_of, is_complete
from skyrun.quant.recipes import RECIPES, find_recipe
from skyrun.sources import DEFAULT_QUANT, SOURCES

_WORK = ".fetched"
_NEEDED = ("transformer", "text_encoder", "vae")
_NEEDED_FOR = {"a2v": (*_NEEDED, "image_encoder", "audio_encoder")}
_COMPANIONS = "r2v"  # whose encoder and autoencoder go with a transformer that does not say its task


class _Part(Protocol):
    """Something that is fetched, and becomes files of the model."""

    @property
    def role(self) -> str: ...
    @property
    def places(self) -> dict[Path, RemoteFile]: ...
    @property
    def results(self) -> dict[str, int]: ...
    @property
    def passing_bytes(self) -> int: ...
    def run(self, display: Display) -> list[Path]: ...
    def clean(self) -> None: ...


@dataclass(frozen=True)
class _Ready:
    """A file that is used as it is."""

    role: str
    file: RemoteFile
    out: Path
    passing_bytes: int = 0

    @property
    def places(self) -> dict[Path, RemoteFile]:
        return {self.out / self.file.name: self.file}

    @property
    def results(self) -> dict[str, int]:
        return {self.file.name: self.file.nbytes}

    def run(self, display: Display) -> list[Path]:
        fetch_shown(self.file, self.out / self.file.name, display)
        return [self.out / self.file.name]

    def clean(self) -> None:
        pass


@dataclass(frozen=True)
class Pull:
    """What will be fetched. parts: those that are not done yet."""

    name: Name
    quant: str
    folder: Path
    manifest: Manifest
    parts: tuple[_Part, ...]

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
            for file in part.places.values():
                lines.append(f"  {file.path}  {size(file.nbytes)}")
        here = f", of which {size(self.here_bytes)} are here" if self.here_bytes else ""
        about = "about " * any("" in part.results for part in self.parts)
        lines.append(
            f"{size(self.fetch_bytes)} to fetch{here}; {about}{size(self.result_bytes)} stay in {self.folder}; "
            f"{about}{size(self.peak_bytes)} of disk are needed on the way"
        )
        return "\n".join(lines)


def plan_pull(name: Name, out: Path | None = None, work: Path | None = None) -> Pull:
    """Decide what to fetch. Reads lists and headers, and keeps small files; nothing large is fetched.

    out: the folder of the model, where it is not to be one among the others. work: of what passes through.
    """
    quant = name.quant or _default_quant(name)
    folder = out or folder_of(name, quant)
    manifest = Manifest.read(folder)
    if manifest is None or (manifest.name, manifest.quant) != (name.stem, quant):
        manifest = Manifest(name.stem, quant)
    if is_complete(folder, manifest):
        return Pull(name, quant, folder, manifest, ())
    _check_folder(folder)
    parts = _Planner(name, quant, folder, work or folder / _WORK, manifest).parts()
    left = [part for part in parts if not _is_done(part, folder, manifest)]
    return Pull(name, quant, folder, manifest, tuple(sorted(left, key=lambda part: -part.passing_bytes)))


def _is_done(part: _Part, folder: Path, manifest: Manifest) -> bool:
    """Whether its files are written, be it that the process ended before it could put that on record."""
    on_record = all(manifest.finished(folder, key_of(file)) for file in part.places.values())
    whole = all(name in manifest.begun and (folder / name).is_file() for name in part.results)
    if whole and not on_record:
        manifest.done |= {key_of(file): list(part.results) for file in part.places.values()}
    return on_record or whole


def _default_quant(name: Name) -> str:
    """The type of a model that was named without one."""
    models = look(list_repository(name.repo)) if name.repo else []
    there = quants(models)
    if not there or DEFAULT_QUANT in there:
        return DEFAULT_QUANT
    if len(there) > 1:
        hint = f"name one of them, such as {name.repo}:{there[0]}"
        raise SkyrunError(f"{name.repo} has transformers of several types: {', '.join(there)}", hint)
    return there[0]


def key_of(file: RemoteFile) -> str:
    """What a manifest calls a file of a repository."""
    return f"{file.repo}/{file.path}"


def check_space(pull: Pull) -> None:
    """SkyrunError if the disk cannot hold what the pull needs on the way."""
    existing = _existing(pull.folder)
    free, there = shutil.disk_usage(existing).free, _allocated(pull)
    needed = pull.peak_bytes - there
    if needed > free:
        raise SkyrunError(
            f"{pull.name} needs {size(needed)} more of disk, and {existing} has {size(free)} free",
            "free some space, choose a smaller --quant, or set SKYRUN_MODELS to a folder on a larger disk",
            FAILED,
        )


def _existing(folder: Path) -> Path:
    """The folder, or the one above it that is there."""
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _check_folder(folder: Path) -> None:
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "read-only" if existing.is_dir() else "a file"
        hint = "choose another folder with -o, or set SKYRUN_MODELS"
        raise SkyrunError(f"cannot write to the folder {folder}: {existing} is {what}", hint)


def _allocated(pull: Pull) -> int:
    """Bytes that unfinished files take on the disk already; they may have holes."""
    unfinished = [*(pull.folder / _WORK).rglob("*"), *pull.folder.glob("*.part"), *pull.folder.glob("*.partial")]
    statuses = [path.stat() for path in unfinished if path.is_file()]
    return sum(min(status.st_size, getattr(status, "st_blocks", 0) * 512) for status in statuses)


def carry_out(pull: Pull, display: Display) -> None:
    """Fetch and convert. What is done is done for good: after an interruption the same pull goes on."""
    with _alone(pull.folder):
        for part in pull.parts:
            pull.manifest.begun = [name for name in part.results if name and not (pull.folder / name).exists()]
            pull.manifest.write(pull.folder)
            written = [path.name for path in part.run(display)]
            pull.manifest.done |= {key_of(file): written for file in part.places.values()}
            pull.manifest.begun = []
            pull.manifest.write(pull.folder)
            part.clean()
        pull.manifest.complete = True
        pull.manifest.write(pull.folder)
        shutil.rmtree(pull.folder / _WORK, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """SkyrunError if another process fetches into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        message = f"another skyrun fetches into {folder}"
        raise SkyrunError(message, "wait for it, then run the same command again", FAILED) from error
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class _Planner:
    """Chooses the parts of one model."""

    name: Name
    quant: str
    folder: Path
    work: Path
    manifest: Manifest

    def parts(self) -> list[_Part]:
        if self.name.repo:
            repository = self._list(self.name.repo)
            models = look(repository)
            return self._ready(repository, models) if quants(models) else self._converted(repository, ())
        source = SOURCES[self.name.task]
        for name in source.gguf:
            repository = self._list(name)
            models = look(repository)
            if self.quant in quants(models):
                return self._ready(repository, models)
            del self.manifest.commits[name]
        return self._converted(self._list(source.checkpoint), source.leave_out)

    def _list(self, name: str) -> Repository:
        repository = list_repository(name, self.manifest.commits.get(name))
        self.manifest.commits[name] = repository.commit
        return repository

    def _ready(self, repository: Repository, models: list[RemoteModel]) -> list[_Part]:
        """Files of a GGUF repository; what they lack to be a model comes from the published checkpoint."""
        chosen = choose(repository.name, models, self.quant, self.name.task)
        parts: list[_Part] = [_Ready(model.role, model.file, self.folder) for model in chosen]
        task = self.name.task or next(model.task for model in chosen if model.role == "transformer") or _COMPANIONS
        lacking = set(_NEEDED_FOR.get(task, _NEEDED)) - {part.role for part in parts}
        if lacking:
            source = SOURCES[task]
            parts += self._converted(self._list(source.checkpoint), source.leave_out, lacking)
        return parts

    def _converted(
        self, repository: Repository, leave_out: tuple[str, ...], roles: set[str] | None = None
    ) -> list[_Part]:
        """What becomes of a checkpoint, or of those parts of it that have such a role."""
        quant = self.quant
        if roles is None:
            find_recipe(quant)
        elif quant not in RECIPES:  # others have types of their own, which encoders do not get
            quant = DEFAULT_QUANT
        work = self.work / repository.name
        return list(steps(repository, leave_out, self.folder, work, quant, lambda r: roles is None or r in roles))
