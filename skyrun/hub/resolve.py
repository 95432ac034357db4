"""Choose the files of a model that is requested by name, and decide how to get each of them."""

from collections.abc import Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from skyrun.errors import BAD_INPUT, SkyrunError
from skyrun.hub.client import Unavailable, list_repository
from skyrun.hub.convert import Step, steps
from skyrun.hub.gguf_repo import RemoteModel, choose, companions, look, nearest_better, quants, transformers
from skyrun.hub.manifest import Manifest
from skyrun.hub.part import Part, Ready, Shared
from skyrun.hub.repository import Repository
from skyrun.hub.store import Name, manifests, models_folder
from skyrun.kernels import name_tables
from skyrun.kernels.files.disk import existing_folder
from skyrun.kernels.files.recipes import RECIPES, find_recipe
from skyrun.planning.hardware import this_machine
from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request
from skyrun.quant.choose.recipes import default_encoder_quant
from skyrun.tasks.sources import DEFAULT_QUANT, SOURCES, model_beside, pinned

_MOST = "Q8_0"  # the largest type that is taken in place of a smaller one; for encoders F16
_MOST_ENCODER = "F16"
_WEIGHTS = (".safetensors", ".pth", ".bin")


def needed_roles(task: str) -> set[str]:
    """The roles of the files that a task needs; "" stands for any task."""
    return {"transformer", *name_tables.needed_roles(task)}


@dataclass(frozen=True)
class Main:
    """Where the transformer comes from. model: None if it is converted. quant: the type that it will have."""

    repository: Repository
    model: RemoteModel | None
    quant: str
    task: str


@dataclass
class Chooser:
    """Chooses the files of one model.

    wanted: the type of its transformer; a better one may do, unless the name has a type. commits: of an earlier
    choice. notes: sentences for the user.
    """

    name: Name
    wanted: str
    commits: dict[str, str]
    notes: list[str] = field(default_factory=list)
    _repositories: dict[str, Repository] = field(default_factory=dict)
    _looked: dict[str, list[RemoteModel]] = field(default_factory=dict)

    def main(self) -> Main:
        """Choose the transformer: from the named repository, or from the first source of the task that has one."""
        if self.name.repo:
            return self._named()
        task, wanted = self.name.task, self.name.quant or self.wanted
        source = SOURCES[self.name.key]
        for name in source.gguf:
            if (repository := self._offered(name)) and (model := self._fitting(repository, wanted)):
                self._say_why(repository, model)
                return Main(repository, model, model.quant, task)
        find_recipe(wanted)
        return Main(self._list(source.checkpoint), None, wanted, task)

    def _named(self) -> Main:
        repository = self._list(self.name.repo)
        models, task = self._look(repository), self.name.task
        there = quants(models, task)
        if not any(model.role == "transformer" for model in models):
            quant = self.name.quant or DEFAULT_QUANT
            find_recipe(quant)
            return Main(repository, None, quant, task)
        quant = self.name.quant or DEFAULT_QUANT
        if not self.name.quant and there and DEFAULT_QUANT not in there:
            if len(there) > 1:
                hint = f"name one of them, such as {self.name.repo}:{there[0]}"
                raise SkyrunError(f"{self.name.repo} has transformers of several types: {', '.join(there)}", hint)
            quant = there[0]
        model = choose(repository.name, models, quant, task)
        self._say_why(repository, model)
        return Main(repository, model, quant, task or model.task)

    def _fitting(self, repository: Repository, wanted: str) -> RemoteModel | None:
        """The transformer of a source with the type or, if no type was named, the nearest better one that will run."""
        models = [m for m in transformers(self._look(repository), self.name.task) if m.task == self.name.task]
        usable = [model for model in models if not model.refused]
        for model in usable:
            if model.quant == wanted:
                return model
        for model in () if self.name.quant else nearest_better(usable, wanted, _MOST):
            if _planned(self.name, model.base)[1]:
                better = f"its nearest better type is {model.quant}"
                self.notes.append(f"a plan takes {wanted}, which {repository.name} does not have: {better}")
                return model
        there = ", ".join(sorted({model.quant for model in usable})) or "none that can be used"
        self.notes.append(f"{repository.name} has no {wanted} transformer for {self.name.task}, it has {there}")
        return None

    def _say_why(self, repository: Repository, model: RemoteModel) -> None:
        if model.by_path:
            self.notes.append(
                f"{model.file.path} of {repository.name} does not say its task: by the words of its path it is for "
                f"{model.task}"
            )

    def parts(self, main: Main, folder: Path, work: Path) -> list[Part]:
        """All parts of the model, whether they are there or not. Raises SkyrunError if one is not available.

        Args:
            main: Where the transformer comes from.
            folder: The folder of the model.
            work: The folder for downloads that are deleted after conversion.
        """
        convert = partial(_converted, quant=main.quant, out=folder, work=work)
        parts: list[Part] = []
        if main.model:
            ready = [main.model, *companions(self._look(main.repository))]
            parts += [Ready(model.role, model.file, folder) for model in ready]
        elif self.name.repo:
            parts += convert(main.repository)
        task = main.task or _task_of(parts)
        model = self.name.source or model_beside(self.name.repo, self.name.task or task)
        source, lacking = SOURCES[model], _lacking(task, parts)
        if "text_encoder" in lacking and (encoder := self._text_encoder(source.text_encoder, main.quant)):
            parts.append(Ready("text_encoder", encoder.file, folder))
            lacking.discard("text_encoder")
        looked_through = self.name.repo == source.checkpoint
        if lacking and not looked_through:
            roles = lacking if parts else set()
            found = convert(self._list(source.checkpoint), leave_out=source.leave_out, roles=roles)
            parts += [part for part in found if part.role in lacking or not roles]
        if lacking := _lacking(task, parts):
            names = ", ".join(sorted(role.replace("_", " ") for role in lacking))
            hint = "expected a repository of SkyReels-V3, or GGUF files of its transformer"
            raise SkyrunError(f"{main.repository.name} has no {names}", hint, BAD_INPUT)
        parts = [_elsewhere(part, folder, main.quant) or part for part in parts]
        used = {"/".join(key.split("/")[:2]) for part in parts for key in part.keys}
        self.commits = {name: found.commit for name, found in self._repositories.items() if name in used}
        return _apart(parts)

    def saved_bytes(self, task: str, parts: list[Part]) -> int:
        """How many bytes less have to be downloaded than for the published checkpoint of a task."""
        source = SOURCES.get(self.name.key or task)
        if source is None or source.checkpoint not in self._repositories:
            return 0
        if not any(isinstance(part, Ready) for part in parts):
            return 0
        files = self._repositories[source.checkpoint].files
        whole = [file for file in files if file.folder.split("/")[0] not in source.leave_out]
        fetched = sum(file.nbytes for part in parts for file in part.sources.values())
        return max(0, sum(file.nbytes for file in whole if file.name.endswith(_WEIGHTS)) - fetched)

    def _text_encoder(self, sources: tuple[str, ...], quant: str) -> RemoteModel | None:
        """A file of the text encoder with a type at least as good as that of a converted one."""
        wanted = _encoder_quant(quant)
        for name in sources:
            if repository := self._offered(name):
                models = [model for model in self._look(repository) if model.role == "text_encoder"]
                if found := nearest_better(models, wanted, _MOST_ENCODER):
                    return found[0]
                reasons = sorted({model.refused for model in models if model.refused}) or [f"is not there as {wanted}"]
                self.notes.append(f"the text encoder of {name} {reasons[0]}: the published one is converted")
        return None

    def _offered(self, source: str) -> Repository | None:
        """A repository of the table; None if it is not available, or if a model was begun without it."""
        name, commit = pinned(source)
        if self.commits and name not in self.commits:
            return None
        try:
            return self._list(name, commit)
        except Unavailable as error:
            if name in self.commits:
                raise
            self.notes.append(f"{error.message}; going on without it")
            return None

    def _list(self, name: str, commit: str | None = None) -> Repository:
        if name not in self._repositories:
            self._repositories[name] = list_repository(name, self.commits.get(name, commit))
        return self._repositories[name]

    def _look(self, repository: Repository) -> list[RemoteModel]:
        if repository.name not in self._looked:
            self._looked[repository.name] = look(repository)
        return self._looked[repository.name]


def planned_quant(name: Name) -> str:
    """The type that a plan for this machine chooses."""
    type, runs = _planned(name)
    return type if runs else DEFAULT_QUANT


def _planned(name: Name, quant: str | None = None) -> tuple[str, bool]:
    """The type that a plan for a typical clip on this machine chooses, and whether the clip can be made."""
    machine = this_machine(model=existing_folder(models_folder()))
    plan = plan_request(Request(name.task, "", quant=quant, variant=name.variant), machine).plan
    return plan.weight_type, not plan.problem


def _converted(
    repository: Repository,
    quant: str,
    out: Path,
    work: Path,
    leave_out: tuple[str, ...] = (),
    roles: Set[str] = frozenset(),
) -> list[Step]:
    """The parts of a checkpoint with these roles, or all of them.

    Args:
        repository: The files of the checkpoint.
        quant: The type of the transformer.
        out: The folder of the model.
        work: The folder for downloads.
        leave_out: Top-level folders to ignore.
        roles: The parts to return; if empty, all of them.
    """
    if quant not in RECIPES:  # encoders get a recipe even if the transformer has another type
        quant = DEFAULT_QUANT
    place = work / repository.name / repository.commit  # files of other commits are not mixed in
    return steps(repository, leave_out, out, place, quant, roles)


def _lacking(task: str, parts: list[Part]) -> set[str]:
    return needed_roles(task) - {part.role for part in parts}


def _task_of(parts: list[Part]) -> str:
    """The task of a converted transformer, as far as its checkpoint tells."""
    files = [file for part in parts if isinstance(part, Step) for file in part.files]
    return next((file.task for file in files if file.task in SOURCES), "")


def _elsewhere(part: Part, out: Path, quant: str) -> Part | None:
    """The same part in the folder of another model, if there is one."""
    for folder, manifest in manifests():
        same = all(manifest.commits.get(file.repo) == file.commit for file in part.sources.values())
        if folder == out or not same or not all(manifest.finished(folder, key) for key in part.keys):
            continue
        files = [folder / name for name in manifest.done[part.keys[0]]]
        sizes = {file.name: file.stat().st_size for file in files}
        if sizes == part.results or ("" in part.results and _same_encoders(quant, manifest)):
            return Shared(part.role, part.keys, tuple(files), out)
    return None


def _apart(parts: list[Part]) -> list[Part]:
    """Return the parts. Raises SkyrunError if two of them would become files of the same name."""
    names = [name for part in parts for name in part.results if name]
    if twice := [name for name in names if names.count(name) > 1]:
        message = f"two parts of the model would be called {twice[0]}"
        raise SkyrunError(message, "fetch its files by hand, and give the folder with --model", BAD_INPUT)
    return parts


def _encoder_quant(quant: str) -> str:
    return default_encoder_quant(quant if quant in RECIPES else DEFAULT_QUANT)


def _same_encoders(quant: str, manifest: Manifest) -> bool:
    return {quant, manifest.quant} <= set(RECIPES) and _encoder_quant(quant) == _encoder_quant(manifest.quant)
