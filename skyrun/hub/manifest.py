"""The manifest of a downloaded model, skyrun-model.json in its folder. It is checked whenever it is read."""

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skyrun.kernels.files.atomic import replacing
from skyrun.kernels.files.disk import is_possible
from skyrun.tasks.sources import SOURCES

_FILE = "skyrun-model.json"
_MAX_BYTES = 1 << 20
_NAME = re.compile(r"[\w.-]{1,200}")  # of a model: a task, or OWNER--NAME
_QUANT = re.compile(r"\w{1,32}", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
_PLAIN = re.compile(r"[^/\\\x00-\x1f:]{1,255}")  # of a file in the folder


@dataclass
class Manifest:
    """What is known about the model in a folder.

    commits: of the repositories that it is made from, so that a repeated command uses the same files. done: the files
    that each file "OWNER/NAME/PATH" of a repository became. begun: files that are being written and did not exist
    before. complete: whether nothing is missing. task: the task that a repository's transformer was chosen for.
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
        """Read the manifest of a folder; None if there is none, or if it is damaged."""
        try:
            with open(folder / _FILE, "rb") as file:
                said: Any = json.loads(file.read(_MAX_BYTES))
            manifest = cls(**said)
            return manifest if manifest._is_sound() else None
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return None

    def _is_sound(self) -> bool:
        """Whether every value is valid. Names in a manifest become paths."""
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
        """Write the manifest into a folder."""
        with replacing(folder / _FILE) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def finished(self, folder: Path, key: str) -> bool:
        """Whether all files that a file of a repository becomes are there."""
        names = self.done.get(key)
        return names is not None and all((folder / name).is_file() for name in names)

    def is_whole(self, folder: Path) -> bool:
        """Whether the model is complete and every file that the manifest lists is there."""
        return self.complete and all(self.finished(folder, key) for key in self.done)


def note_use(folder: Path) -> None:
    """Record that a model is used now."""
    with suppress(OSError):
        os.utime(folder / _FILE)


def last_use(folder: Path) -> float:
    """When a model was last used, in seconds since 1970."""
    return (folder / _FILE).stat().st_mtime


def forget(folder: Path) -> None:
    """Delete the manifest of a folder."""
    (folder / _FILE).unlink(missing_ok=True)
