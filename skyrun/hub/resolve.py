"""Which files make up a model that is asked for by name, and what has to be done to have each of them."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from skyrun.cli.progress import Display
from skyrun.errors import BAD_INPUT, SkyrunError
from skyrun.hub.client import RemoteFile, Repository, list_repository
from skyrun.hub.convert import Step, fetch_shown, steps
from skyrun.hub.gguf_repo import RemoteModel, choose, look, quants
from skyrun.hub.store import Manifest, Name, manifests, models_folder
from skyrun.kernels.disk import existing_folder
from skyrun.planning.hardware import this_machine
from skyrun.planning.what_if import Clip, plan_clip
from skyrun.quant.recipes import RECIPES, default_encoder_quant, find_recipe
from skyrun.tasks.sources import DEFAULT_QUANT, SOURCES

_NEEDED = ("transformer", "text_encoder", "vae")
_NEEDED_FOR = {"a2v": (*_NEEDED, "image_encoder", "audio_encoder")}
_COMPANIONS = "r2v"  # whose encoder and autoencoder go with a transformer that does not say its task


class Part(Protocol):
    """Something that becomes files of the model.

    keys: what a manifest calls it. places: files that are fetched for it, by where they will be. results: names of the
    files that it becomes, and what they add to the disk. passing_bytes: the most that is there beside them meanwhile.
    """

    @property
    def role(self) -> str: ...
    @property
    def keys(self) -> list[str]: ...
    @property
    def places(self) -> dict[Path, RemoteFile]: ...
    @property
    def results(self) -> dict[str, int]: ...
    @property
    def passing_bytes(self) -> int: ...
    def text(self) -> list[tuple[str, int]]: ...
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
    def keys(self) -> list[str]:
        return [self.file.key]

    @property
    def places(self) -> dict[Path, RemoteFile]:
        return {self.out / self.file.name: self.file}

    @property
    def results(self) -> dict[str, int]:
        return {self.file.name: self.file.nbytes}

    def text(self) -> list[tuple[str, int]]:
        return [(self.file.path, self.file.nbytes)]

    def run(self, display: Display) -> list[Path]:
        fetch_shown(self.file, self.out / self.file.name, display)
        return [self.out / self.file.name]

    def clean(self) -> None:
        pass


@dataclass(frozen=True)
class _Shared:
    """Files that another model has already: they get a second name, or are copied where that cannot be."""

    role: str
    keys: list[str]
    files: tuple[Path, ...]
    out: Path
    passing_bytes: int = 0

    @property
    def places(self) -> dict[Path, RemoteFile]:
        return {}

    @property
    def results(self) -> dict[str, int]:
        return dict.fromkeys((file.name for file in self.files), 0)

    def text(self) -> list[tuple[str, int]]:
        return [(f"{file} (here already)", 0) for file in self.files]

    def run(self, display: Display) -> list[Path]:
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


def default_quant(name: Name) -> str:
    """The type of a model that was named without one: of a task's what a plan for this machine takes."""
    if name.task:
        planned = plan_clip(Clip(name.task), this_machine(model=existing_folder(models_folder()))).plan
        return DEFAULT_QUANT if planned.problem else planned.weight_type
    there = quants(look(list_repository(name.repo)))
    if not there or DEFAULT_QUANT in there:
        return DEFAULT_QUANT
    if len(there) > 1:
        hint = f"name one of them, such as {name.repo}:{there[0]}"
        raise SkyrunError(f"{name.repo} has transformers of several types: {', '.join(there)}", hint)
    return there[0]


@dataclass(frozen=True)
class Chooser:
    """Chooses the parts of one model. work: the folder of what passes through. Notes commits in the manifest."""

    name: Name
    quant: str
    folder: Path
    work: Path
    manifest: Manifest

    def parts(self) -> list[Part]:
        """Everything that the model needs, whether it is there or not. SkyrunError if it cannot be had."""
        repository, parts, task = self._main()
        lacking = self._lacking(task, parts)
        source = SOURCES[task or _COMPANIONS]
        if lacking and source.checkpoint != repository.name:
            found = self._converted(self._list(source.checkpoint), source.leave_out, "")
            parts += [part for part in found if part.role in lacking]
            lacking = self._lacking(task, parts)
        if lacking:
            names = ", ".join(sorted(role.replace("_", " ") for role in lacking))
            hint = "expected a repository of SkyReels-V3, or GGUF files of its transformer"
            raise SkyrunError(f"{repository.name} has no {names}", hint, BAD_INPUT)
        return [self._elsewhere(part) or part for part in parts]

    def _main(self) -> tuple[Repository, list[Part], str]:
        """The repository that has the transformer, its parts, and the task, "" if nothing tells."""
        if self.name.repo:
            repository = self._list(self.name.repo)
            if quants(models := look(repository)):
                return repository, *self._ready(repository, models)
            return repository, self._converted(repository, (), "transformer"), ""
        source = SOURCES[self.name.task]
        for name in source.gguf:
            repository = self._list(name)
            if self.quant in quants(models := look(repository)):
                return repository, *self._ready(repository, models)
            del self.manifest.commits[name]
        repository = self._list(source.checkpoint)
        return repository, self._converted(repository, source.leave_out, "transformer"), self.name.task

    def _list(self, name: str) -> Repository:
        repository = list_repository(name, self.manifest.commits.get(name))
        self.manifest.commits[name] = repository.commit
        return repository

    def _lacking(self, task: str, parts: list[Part]) -> set[str]:
        return set(_NEEDED_FOR.get(task, _NEEDED)) - {part.role for part in parts}

    def _ready(self, repository: Repository, models: list[RemoteModel]) -> tuple[list[Part], str]:
        chosen = choose(repository.name, models, self.quant, self.name.task)
        said = next(model.task for model in chosen if model.role == "transformer")
        return [_Ready(model.role, model.file, self.folder) for model in chosen], self.name.task or said

    def _converted(self, repository: Repository, leave_out: tuple[str, ...], main: str) -> list[Part]:
        """What becomes of a checkpoint. main: the role that gets the type which was asked for, if it is in there."""
        quant = self.quant
        if main:
            find_recipe(quant)
        elif quant not in RECIPES:  # others have types of their own, which encoders do not get
            quant = DEFAULT_QUANT
        work = self.work / repository.name / repository.commit  # what is left of another commit is not of use
        return list(steps(repository, leave_out, self.folder, work, quant))

    def _elsewhere(self, part: Part) -> Part | None:
        """The same part in the folder of another model."""
        if not isinstance(part, Step):
            return None
        for folder, manifest in manifests():
            same = all(manifest.commits.get(file.repo) == file.commit for file in part.sources.values())
            if folder == self.folder or not same or not all(manifest.finished(folder, key) for key in part.keys):
                continue
            files = [folder / name for name in manifest.done[part.keys[0]]]
            sizes = {file.name: file.stat().st_size for file in files}
            if sizes == part.results or ("" in part.results and self._same_encoders(manifest.quant)):
                return _Shared(part.role, part.keys, tuple(files), self.folder)
        return None

    def _same_encoders(self, quant: str) -> bool:
        if not {quant, self.quant} <= set(RECIPES):
            return False
        return default_encoder_quant(quant) == default_encoder_quant(self.quant)
