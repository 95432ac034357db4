"""The models on this machine: parse their names, find their folders, list and remove them.

Nothing here imports torch, the quantizer or huggingface-hub: a run with local files needs none of them.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from skyrun.errors import BAD_INPUT, FAILED, MODEL_MISSING, SkyrunError
from skyrun.hub.manifest import Manifest, forget, last_use
from skyrun.kernels.files.disk import allocated
from skyrun.kernels.machine.cache import home_folder
from skyrun.tasks import spec_of
from skyrun.tasks.sources import BUILT_IN, SOURCES, model_beside, tasks_of
from skyrun.units import size

MODELS_VARIABLE = "SKYRUN_MODELS"  # of the environment
LOCK = ".lock"  # in the folder of a model
WORK = ".fetched"  # subfolder for downloads that are deleted after conversion
_REPOSITORY = re.compile(r"[\w.-]{1,100}/[\w.-]{1,100}")
_TYPE = re.compile(r"[A-Za-z0-9_]{1,32}")


def models_folder() -> Path:
    """The folder of all models: $SKYRUN_MODELS, or skyrun's folder in the user's data."""
    if named := os.environ.get(MODELS_VARIABLE):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local") / "skyrun" / "models"
    return Path(os.environ.get("XDG_DATA_HOME") or _home() / ".local" / "share") / "skyrun" / "models"


def _home() -> Path:
    return home_folder(MODELS_VARIABLE)


@dataclass(frozen=True)
class Name:
    """The name of a model.

    repo: OWNER/NAME, or the name of a model that is built in; "" for the model of a task. quant: "" if any type will
    do. source: its name in the table of sources; "" for a repository, and for the usual model of its task.
    """

    task: str
    repo: str
    quant: str
    source: str = ""

    def __str__(self) -> str:
        return (self.repo or self.key) + (f":{self.quant}" if self.quant else "")

    @property
    def key(self) -> str:
        """The name in the table of sources of this model, or of one whose other files it can use."""
        return self.source or self.task

    @property
    def variant(self) -> str | None:
        """Which of the models that do the task it is, as far as its name or its repository says."""
        return spec_of(self.task, self.source or model_beside(self.repo, self.task)).model or None

    @property
    def stem(self) -> str:
        """Its name in a manifest."""
        return self.repo.replace("/", "--") or self.key


def parse_name(text: str, quant: str | None = None, task: str | None = None) -> Name:
    """Parse the name of a model in the table of sources or a built-in one, OWNER/NAME, or any of them with :TYPE.

    Raises SkyrunError for anything else.

    Args:
        text: The name.
        quant: A type that is stated elsewhere; it may not contradict the name.
        task: The task to take a repository's transformer for.
    """
    base, colon, type = text.partition(":")
    if (base not in SOURCES and base not in BUILT_IN and not _REPOSITORY.fullmatch(base)) or (
        colon and not _TYPE.fullmatch(type)
    ):
        raise SkyrunError(
            f"{text!r} is not the name of a model that can be fetched",
            f"expected {', '.join((*SOURCES, *BUILT_IN))}, or OWNER/NAME:TYPE such as OWNER/NAME:Q4_K_M",
            BAD_INPUT,
        )
    asked = (quant or "").upper()
    if type and asked not in ("", type.upper()):
        raise SkyrunError(f"got {text} and --quant {quant}, expected one type", "leave out one of them", BAD_INPUT)
    if base in SOURCES:
        does = tasks_of(base)
        if task is not None and task not in does:
            message = f"{base} is a model for {' and '.join(does)}, not for {task}"
            raise SkyrunError(message, f"use it with `skyrun run {does[0]}`", BAD_INPUT)
        return Name(task or does[0], "", type.upper() or asked, base)
    if base in BUILT_IN:
        return Name(BUILT_IN[base], base, type.upper() or asked)
    return Name(task or "", base, type.upper() or asked)


def sources_of(name: Name) -> list[str]:
    """The repositories that a missing model can be downloaded from, the first choice first."""
    source = SOURCES.get(name.key)
    return [name.repo] if name.repo else [*source.gguf, source.checkpoint] if source else []


def sources_text(name: Name, sizes: Mapping[str, int]) -> str:
    """Sentences about where a missing model can be downloaded from, and how large its files are.

    sizes: what they take on the disk, by role.
    """
    parts = ", ".join(f"{role} {size(nbytes)}" for role, nbytes in sizes.items())
    return (
        f"{name} is not here: skyrun pull {name}, or a run, fetches it from {' or '.join(sources_of(name))}\n"
        f"{parts}: {size(sum(sizes.values()))} in all; what is converted while it arrives is larger before, "
        f"skyrun pull {name} --dry-run says by how much"
    )


def folder_of(name: Name, quant: str, root: Path | None = None) -> Path:
    """The folder for a model of a type.

    Args:
        name: The name of the model.
        quant: Its type.
        root: The folder of all models, by default `models_folder()`.
    """
    task = f"--{name.task}" if "/" in name.repo and name.task else ""
    return (root or models_folder()) / f"{name.stem}{task}-{quant}"


def manifests() -> list[tuple[Path, Manifest]]:
    """Each folder of a model, with its manifest."""
    return [(folder, manifest) for folder in sorted(models_folder().glob("*")) if (manifest := Manifest.read(folder))]


def pulled(name: Name) -> list[tuple[Path, Manifest]]:
    """The folders of a model, complete or not: complete ones first, larger ones before smaller ones."""
    found = [
        (folder, manifest)
        for folder, manifest in manifests()
        if manifest.name == name.stem and name.quant in ("", manifest.quant) and name.task in ("", *_tasks(manifest))
    ]
    return sorted(found, key=lambda pair: (not pair[1].complete, -_bytes_in(pair[0])))


def _tasks(manifest: Manifest) -> list[str]:
    """The tasks that a model may be used for, according to its manifest."""
    return [manifest.task] if manifest.task else [task for model in SOURCES for task in tasks_of(model)]


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Lock the folder of a model. Raises SkyrunError with the message `what` if another process has locked it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SkyrunError(what, "wait for it, then run the same command again", FAILED) from error
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Stored:
    """A downloaded model.

    task: "" if it is unknown. commits: of the repositories that it was made from. used: seconds since 1970.
    """

    name: str
    task: str
    folder: Path
    quant: str
    nbytes: int
    complete: bool
    commits: dict[str, str]
    used: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {
            "name": self.name,
            "task": self.task,
            "quant": self.quant,
            "folder": str(self.folder),
            "bytes": self.nbytes,
        }
        return values | {"complete": self.complete, "repositories": self.commits, "used": round(self.used)}


def stored() -> list[Stored]:
    """All models that were downloaded, completely or in part."""
    return [_stored(folder, manifest) for folder, manifest in manifests()]


def _stored(folder: Path, manifest: Manifest) -> Stored:
    nbytes = sum(allocated(path) for path in folder.rglob("*") if path.is_file())
    name = f"{manifest.name.replace('--', '/', 1)}:{manifest.quant}"
    task = manifest.task or (tasks_of(manifest.name)[0] if manifest.name in SOURCES else "")
    facts = (name, task, folder, manifest.quant, nbytes, manifest.is_whole(folder), manifest.commits)
    return Stored(*facts, last_use(folder))


def remove(text: str) -> Stored:
    """Delete a model by its name or by the name of its folder. Raises SkyrunError if there is none, or several."""
    there = stored()
    found = [model for model in there if text in (model.name, model.folder.name)]
    found = found or [model for model in there if model.name.partition(":")[0] == text]
    if not found:
        names = ", ".join(model.name for model in there) or "no model"
        raise SkyrunError(f"there is no model {text!r} in {models_folder()}", f"it has {names}", MODEL_MISSING)
    if len(found) > 1:
        names = ", ".join(model.folder.name for model in found)
        raise SkyrunError(f"{text!r} may be any of {names}", f"name one of them: skyrun remove {found[0].folder.name}")
    (model,) = found
    if model.folder.is_symlink():
        raise SkyrunError(f"{model.folder} is a link to another folder", "delete that by hand, if it is not needed")
    with alone_in(model.folder, f"another skyrun is downloading into {model.folder}, it cannot be removed"):
        _delete(model.folder)
    with suppress(OSError):  # the user's own files stay
        (model.folder / LOCK).unlink(missing_ok=True)
        model.folder.rmdir()
    return model


def _delete(folder: Path) -> None:
    """Delete the files of a model, and its manifest last, so that an interrupted removal can be repeated."""
    manifest = Manifest.read(folder)
    names = [*manifest.begun, *(name for files in manifest.done.values() for name in files)] if manifest else []
    shutil.rmtree(folder / WORK, ignore_errors=True)
    for pattern in ("*.part", "*.partial", "*.partial.journal"):
        names += [path.name for path in folder.glob(pattern)]
    for name in names:
        (folder / name).unlink(missing_ok=True)
    forget(folder)
