"""The folder of the page: clips at its top; in `.skyrun` the queue, what was uploaded, and pictures of clips.

Whatever a client names is looked up in one of these places, by a name without a way out of it.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from skyrun.errors import SkyrunError
from skyrun.hub.store import models_folder
from skyrun.kernels.files.disk import is_possible

_CLIP = ".mp4"
_UNFINISHED = ".skyrun.safetensors"  # what a run keeps beside a clip that is not finished
_OWN = re.compile(r"\.skyrun\.(\d+\.)?(safetensors|mkv|lock)")  # such files, after the stem of the clip


class Refused(SkyrunError):
    """A request over HTTP that is answered with an error. status: of the answer."""

    def __init__(self, status: int, message: str, hint: str = "", **fields: list[str]) -> None:
        super().__init__(message, hint)
        self.status, self.fields = status, fields


@dataclass(frozen=True)
class Folder:
    """A folder of clips with what belongs to the page."""

    root: Path

    @property
    def state(self) -> Path:
        """What only skyrun uses."""
        return self.root / ".skyrun"

    @property
    def inputs(self) -> Path:
        """What was uploaded, under names that we gave it."""
        return self.state / "inputs"

    @property
    def jobs(self) -> Path:
        """A JSON file for each job, and a folder with what its process says."""
        return self.state / "jobs"

    @property
    def posters(self) -> Path:
        """Pictures of clips, and what is known of them."""
        return self.state / "posters"

    def create(self) -> None:
        """Make all folders. Raises SkyrunError if that cannot be."""
        try:
            for folder in (self.inputs, self.jobs, self.posters):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SkyrunError(f"{self.root} cannot hold clips: {error}", "choose another --folder") from error

    def clips(self) -> list[Path]:
        """The clips, newest first."""
        with os.scandir(self.root) as entries:
            found = [(entry.stat().st_mtime_ns, entry.name) for entry in entries if _is_clip(entry)]
        return [self.root / name for _, name in sorted(found, reverse=True)]

    def clip(self, name: str) -> Path:
        """The clip of a name. Raises Refused (404) if there is none."""
        path = self.root / name if _is_plain(name) and name.lower().endswith(_CLIP) else None
        if path is None or not path.is_file():
            raise Refused(404, f"there is no clip {name!r}", "GET /api/clips lists them")
        return path

    def place(self, name: str, suffix: str) -> Path:
        """Where a new file of this name goes. Raises Refused if it is not a plain name with that suffix."""
        if not _is_plain(name) or not name.lower().endswith(suffix) or _OWN.search(name):
            raise Refused(
                400, f"{name!r} is not the name of a file, expected such as clip{suffix}", "leave out folders"
            )
        return self.root / name

    def find(self, name: str) -> Path | None:
        """An upload, a clip, or another file or folder in the folder or in that of the models; None if there is none.

        Links that the user has put there are followed: no request can make one.
        """
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or not is_possible(Path(name)) or Path(name).is_absolute() or os.path.splitdrive(name)[0]:
            return None
        if parts[0] in ("/", self.state.name) or ".." in parts:
            return None
        places = [place / name for place in (self.inputs, self.root, models_folder())]
        return next((place for place in places if place.exists()), None)

    def name_of(self, path: str) -> str:
        """The name by which `find` finds a path; "" for paths elsewhere."""
        for place in (self.inputs, self.root, models_folder()):
            if Path(path).is_relative_to(place.absolute()):
                return Path(path).relative_to(place.absolute()).as_posix()
        return ""

    def beside(self, clip: Path) -> Iterator[Path]:
        """What runs keep beside a clip until it is finished."""
        for path in clip.parent.iterdir():
            if path.name.startswith(clip.stem) and _OWN.fullmatch(path.name[len(clip.stem) :]):
                yield path

    def is_free(self, name: str) -> bool:
        """Whether no clip has that name, finished or not."""
        path = self.root / name
        return not path.exists() and not path.with_name(path.stem + _UNFINISHED).exists()


def _is_clip(entry: "os.DirEntry[str]") -> bool:
    return entry.name.lower().endswith(_CLIP) and not entry.name.startswith(".") and entry.is_file()


def _is_plain(name: str) -> bool:
    """Whether a text is the name of a file in a folder, and not hidden."""
    return bool(name) and Path(name).name == name and not name.startswith(".") and is_possible(Path(name))
