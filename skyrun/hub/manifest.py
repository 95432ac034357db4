"""What the folder of a fetched model says of it: skyrun-model.json, written here and read as if by someone else."""

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skyrun.kernels.atomic import replacing
from skyrun.kernels.disk import is_possible
from skyrun.tasks.sources import SOURCES

_FILE = "skyrun-model.json"
_MAX_BYTES = 1 << 20
_NAME = re.compile(r"[\w.-]{1,200}")  # of a model: a task, or OWNER--NAME
_QUANT = re.compile(r"\w{1,32}", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
_PLAIN = re.compile(r"[^/\\\x00-\x1f:]{1,255}")  # of a file in the folder


@dataclass
class Manifest:
    """What a folder says of its model.

    commits: of the repositories that it is made from, so that a repeated command goes on with the same files. done:
    paths in a repository, as "OWNER/NAME/PATH", and the files that they became. begun: files that are being made, and
    were not there before. complete: whether nothing is missing. task: that a repository's transformer was taken for.
    """

    name: str
    quant: str
    commits: dict[str, str] = field(default_factory=dict)
    done: dict[str, list[str]] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    complete: bool = False
    task: str = ""

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """That of a folder, None where it has none, or a damaged one."""
        try:
            with open(folder / _FILE, "rb") as file:
                said: Any = json.loads(file.read(_MAX_BYTES))
            manifest = cls(**said)
            return manifest if manifest._is_sound() else None
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return None

    def _is_sound(self) -> bool:
        """Whether every value is what it should be: names in it become paths."""
        names = [*self.begun, *(name for files in self.done.values() for name in files)]
        return (
            _NAME.fullmatch(self.name) is not None
            and _QUANT.fullmatch(self.quant) is not None
            and all(_COMMIT.fullmatch(commit) for commit in self.commits.values())
            and isinstance(self.begun, list)
            and all(isinstance(files, list) for files in self.done.values())
            and all(_PLAIN.fullmatch(name) and name.strip(". ") and is_possible(Path(name)) for name in names)
            and isinstance(self.complete, bool)
            and self.task in ("", *SOURCES)
        )

    def write(self, folder: Path) -> None:
        """Into a folder."""
        with replacing(folder / _FILE) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def finished(self, folder: Path, key: str) -> bool:
        """Whether a file of a repository has become what it is to be."""
        names = self.done.get(key)
        return names is not None and all((folder / name).is_file() for name in names)

    def is_whole(self, folder: Path) -> bool:
        """Whether every file that it lists is there."""
        return self.complete and all(self.finished(folder, key) for key in self.done)


def note_use(folder: Path) -> None:
    """Put on record that a model is used now."""
    with suppress(OSError):
        os.utime(folder / _FILE)


def last_use(folder: Path) -> float:
    """When a model was used, in seconds since 1970."""
    return (folder / _FILE).stat().st_mtime


def forget(folder: Path) -> None:
    """Delete the record of a folder."""
    (folder / _FILE).unlink(missing_ok=True)
