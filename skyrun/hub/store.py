"""Models by name: what a name means, where its files are, and what of them is there. Nothing here imports torch."""

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrun.errors import BAD_INPUT, SkyrunError
from skyrun.kernels.atomic import replacing
from skyrun.kernels.cache import home_folder
from skyrun.tasks.sources import SOURCES

MODELS_VARIABLE = "SKYRUN_MODELS"  # of the environment
_MANIFEST = "skyrun-model.json"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_TYPE = re.compile(r"[A-Za-z0-9_]+")


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
    """A model that is asked for. task: "" if a repository was named. quant: "" if any type will do."""

    task: str
    repo: str
    quant: str

    def __str__(self) -> str:
        return (self.task or self.repo) + (f":{self.quant}" if self.quant else "")

    @property
    def stem(self) -> str:
        """Of its folder, before the type."""
        return self.task or self.repo.replace("/", "--")


def parse_name(text: str, quant: str | None = None) -> Name:
    """A task, OWNER/NAME, or either with :TYPE. SkyrunError for anything else."""
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
    known = base in SOURCES
    return Name(base if known else "", "" if known else base, type.upper() or asked)


@dataclass
class Manifest:
    """What the folder of a model says of it.

    commits: of the repositories that it is made from, so that a repeated command goes on with the same files. done:
    paths in a repository, as "OWNER/NAME/PATH", and the files that they became. begun: files that are being made, and
    were not there before. complete: whether nothing is missing.
    """

    name: str
    quant: str
    commits: dict[str, str] = field(default_factory=dict)
    done: dict[str, list[str]] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """That of a folder, None where it has none, or a damaged one."""
        try:
            said: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            manifest = cls(**said)
            whole = all(isinstance(files, list) for files in manifest.done.values())
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        return manifest if whole else None

    def write(self, folder: Path) -> None:
        """Into a folder."""
        with replacing(folder / _MANIFEST) as partial:
            partial.write_text(json.dumps(self.__dict__, indent=1), encoding="utf-8")

    def finished(self, folder: Path, key: str) -> bool:
        """Whether a file of a repository has become what it is to be."""
        names = self.done.get(key)
        return names is not None and all((folder / name).is_file() for name in names)


def folder_of(name: Name, quant: str, root: Path | None = None) -> Path:
    """The folder of a model of a type."""
    return (root or models_folder()) / f"{name.stem}-{quant}"


def pulled(name: Name) -> list[tuple[Path, Manifest]]:
    """Folders that hold the model, or a beginning of it: complete ones first, of those the largest."""
    root = models_folder()
    pattern = f"{name.stem}-{name.quant or '*'}"
    found = [(folder, manifest) for folder in root.glob(pattern) if (manifest := Manifest.read(folder))]
    found = [(folder, manifest) for folder, manifest in found if manifest.name == name.stem]
    return sorted(found, key=lambda pair: (not pair[1].complete, -_bytes_in(pair[0])))


def manifests() -> list[tuple[Path, Manifest]]:
    """Every folder among the models, with what it says of itself."""
    return [(folder, manifest) for folder in sorted(models_folder().glob("*")) if (manifest := Manifest.read(folder))]


def is_complete(folder: Path, manifest: Manifest) -> bool:
    """Whether every file that it lists is there."""
    return manifest.complete and all(manifest.finished(folder, key) for key in manifest.done)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
