"""The parts of a model: each knows what to download for it, and what files it becomes."""

import os
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from skyrun.events import Event
from skyrun.hub.client import fetch
from skyrun.hub.repository import RemoteFile


class Part(Protocol):
    """A part that becomes files of the model.

    keys: of its files in a manifest. sources: files that it is made from, by the path that they are downloaded to.
    places: those that are still needed. results: names of the files that it becomes, and the bytes that they add to the
    disk. passing_bytes: the most bytes that are on the disk besides them at any time.
    """

    @property
    def role(self) -> str: ...
    @property
    def keys(self) -> list[str]: ...
    @property
    def sources(self) -> dict[Path, RemoteFile]: ...
    @property
    def places(self) -> dict[Path, RemoteFile]: ...
    @property
    def results(self) -> dict[str, int]: ...
    @property
    def passing_bytes(self) -> int: ...
    def text(self) -> list[tuple[str, int]]: ...
    def run(self) -> Generator[Event, None, list[Path]]: ...
    def clean(self) -> None: ...


@dataclass(frozen=True)
class Ready:
    """A file that is used without conversion."""

    role: str
    file: RemoteFile
    out: Path
    passing_bytes: int = 0

    @property
    def keys(self) -> list[str]:
        return [self.file.key]

    @property
    def sources(self) -> dict[Path, RemoteFile]:
        return {self.out / self.file.name: self.file}

    @property
    def places(self) -> dict[Path, RemoteFile]:
        return self.sources

    @property
    def results(self) -> dict[str, int]:
        return {self.file.name: self.file.nbytes}

    def text(self) -> list[tuple[str, int]]:
        return [(f"{self.file.path} of {self.file.repo}", self.file.nbytes)]

    def run(self) -> Generator[Event, None, list[Path]]:
        yield from fetch(self.file, self.out / self.file.name)
        return [self.out / self.file.name]

    def clean(self) -> None:
        pass


@dataclass(frozen=True)
class Shared:
    """Files that another model already has: they are linked, or copied if that is not possible."""

    role: str
    keys: list[str]
    files: tuple[Path, ...]
    out: Path
    passing_bytes: int = 0

    @property
    def sources(self) -> dict[Path, RemoteFile]:
        return {}

    @property
    def places(self) -> dict[Path, RemoteFile]:
        return {}

    @property
    def results(self) -> dict[str, int]:
        return dict.fromkeys((file.name for file in self.files), 0)

    def text(self) -> list[tuple[str, int]]:
        return [(f"{file} (here already)", 0) for file in self.files]

    def run(self) -> Generator[Event, None, list[Path]]:
        yield from ()
        for file in self.files:
            partial = self.out / f"{file.name}.part"
            partial.unlink(missing_ok=True)
            try:
                os.link(file, partial)
            except OSError:
                shutil.copyfile(file, partial)
            os.replace(partial, self.out / file.name)
        return [self.out / file.name for file in self.files]

    def clean(self) -> None:
        pass
