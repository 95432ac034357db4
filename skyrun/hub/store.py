"""Models by name: what a name means, where its files are, and what of them is there.

Nothing here imports torch, the quantizer or huggingface-hub: a run with files that are there needs none of them.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from skyrun.errors import BAD_INPUT, FAILED, MODEL_MISSING, SkyrunError
from skyrun.hub.manifest import Manifest, forget, last_use
from skyrun.kernels.cache import home_folder
from skyrun.kernels.disk import allocated
from skyrun.tasks.sources import SOURCES

MODELS_VARIABLE = "SKYRUN_MODELS"  # of the environment
LOCK = ".lock"  # in a folder that is fetched into
WORK = ".fetched"  # in it, for what passes through
_REPOSITORY = re.compile(r"[\w.-]{1,100}/[\w.-]{1,100}")
_TYPE = re.compile(r"[A-Za-z0-9_]{1,32}")


def models_folder() -> Path:
    """Where models are kept: $SKYRUN_MODELS, or a folder of skyrun's in the user's data."""
    if named := os.environ.get(MODELS_VARIABLE):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local") / "skyrun" / "models"
    return Path(os.environ.get("XDG_DATA_HOME") or _home() / ".local" / "share") / "skyrun" / "models"


def _home() -> Path:
    return home_folder(MODELS_VARIABLE)


@dataclass(frozen=True)
class Name:
    """A model that is asked for. repo: "" for the model of a task. quant: "" if any type will do."""

    task: str
    repo: str
    quant: str

    def __str__(self) -> str:
        return (self.repo or self.task) + (f":{self.quant}" if self.quant else "")

    @property
    def stem(self) -> str:
        """What its manifest calls it."""
        return self.repo.replace("/", "--") or self.task


def parse_name(text: str, quant: str | None = None, task: str | None = None) -> Name:
    """A task, OWNER/NAME, or either with :TYPE. task: of a repository's transformers. SkyrunError for anything else."""
    base, colon, type = text.partition(":")
    if (base not in SOURCES and not _REPOSITORY.fullmatch(base)) or (colon and not _TYPE.fullmatch(type)):
        raise SkyrunError(
            f"{text!r} is no model that can be fetched",
            f"expected {', '.join(SOURCES)}, or OWNER/NAME:TYPE such as OWNER/NAME:Q4_K_M",
            BAD_INPUT,
        )
    asked = (quant or "").upper()
    if type and asked not in ("", type.upper()):
        raise SkyrunError(f"got {text} and --quant {quant}, expected one type", "leave out one of them", BAD_INPUT)
    if base in SOURCES:
        return Name(base, "", type.upper() or asked)
    return Name(task or "", base, type.upper() or asked)


def wanted_name(model: str | None, task: str, quant: str | None) -> Name | None:
    """The model that a clip is to be made with, by default that of its task; None where a path is meant."""
    if model is not None and (Path(model).exists() or not _is_name(model)):
        return None
    return parse_name(model or task, quant, task)


def _is_name(text: str) -> bool:
    """Whether it cannot be meant as a path: OWNER/NAME has to have a type behind it here."""
    return text in SOURCES or (":" in text and not Path(text).is_absolute())


def whole_folder(name: Name) -> Path | None:
    """The folder of a model that is there as a whole; None if it has to be fetched."""
    found = pulled(name)
    return found[0][0] if found and found[0][1].is_whole(found[0][0]) else None


def sources_text(name: Name) -> str:
    """What a run does about a model that is not there."""
    source = SOURCES.get(name.task)
    places = [name.repo] if name.repo else [*source.gguf, source.checkpoint] if source else []
    return f"{name} is not here: skyrun pull {name}, or a run, fetches it from {' or '.join(places)}"


def folder_of(name: Name, quant: str, root: Path | None = None) -> Path:
    """The folder of a model of a type."""
    task = f"--{name.task}" if name.repo and name.task else ""
    return (root or models_folder()) / f"{name.stem}{task}-{quant}"


def manifests() -> list[tuple[Path, Manifest]]:
    """Every folder among the models, with what it says of itself."""
    return [(folder, manifest) for folder in sorted(models_folder().glob("*")) if (manifest := Manifest.read(folder))]


def pulled(name: Name) -> list[tuple[Path, Manifest]]:
    """Folders that hold the model, or a beginning of it: complete ones first, of those the largest."""
    found = [
        (folder, manifest)
        for folder, manifest in manifests()
        if manifest.name == name.stem and name.quant in ("", manifest.quant) and name.task in ("", *_tasks(manifest))
    ]
    return sorted(found, key=lambda pair: (not pair[1].complete, -_bytes_in(pair[0])))


def _tasks(manifest: Manifest) -> list[str]:
    """For which a model may be used, as far as its manifest tells."""
    return [manifest.task] if manifest.task else list(SOURCES)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes from fetching into a folder. SkyrunError, saying `what` it stops, if one does already."""
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
    """A model that was fetched. task: "" if it is not known. commits: of the repositories it is from. used: seconds
    since 1970."""

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
    """The models that were fetched, or are being fetched."""
    return [_stored(folder, manifest) for folder, manifest in manifests()]


def _stored(folder: Path, manifest: Manifest) -> Stored:
    nbytes = sum(allocated(path) for path in folder.rglob("*") if path.is_file())
    name = f"{manifest.name.replace('--', '/', 1)}:{manifest.quant}"
    task = manifest.task or manifest.name * (manifest.name in SOURCES)
    facts = (name, task, folder, manifest.quant, nbytes, manifest.is_whole(folder), manifest.commits)
    return Stored(*facts, last_use(folder))


def remove(text: str) -> Stored:
    """Delete the model of a name, as `stored` has it, or its folder's. SkyrunError if there is none, or several."""
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
    with alone_in(model.folder, f"a skyrun fetches into {model.folder}, it cannot be removed"):
        _delete(model.folder)
    with suppress(OSError):  # what else somebody keeps there stays
        (model.folder / LOCK).unlink(missing_ok=True)
        model.folder.rmdir()
    return model


def _delete(folder: Path) -> None:
    """Delete what was fetched into a folder, its record at last: what is left of an interruption can be removed too."""
    manifest = Manifest.read(folder)
    names = [*manifest.begun, *(name for files in manifest.done.values() for name in files)] if manifest else []
    shutil.rmtree(folder / WORK, ignore_errors=True)
    for pattern in ("*.part", "*.partial", "*.partial.journal"):
        names += [path.name for path in folder.glob(pattern)]
    for name in names:
        (folder / name).unlink(missing_ok=True)
    forget(folder)
