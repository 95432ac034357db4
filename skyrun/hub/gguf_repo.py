"""Repositories of GGUF files: describe each file from its header, and choose the files of a model."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from skyrun.errors import BAD_INPUT, MODEL_MISSING, SkyrunError
from skyrun.hub.client import read_start
from skyrun.hub.head import HEAD_BYTES, Head, read_head
from skyrun.hub.repository import RemoteFile, Repository
from skyrun.kernels.files.names import Match, recognise
from skyrun.kernels.files.recipes import RECIPES
from skyrun.kernels.formats import FORMATS
from skyrun.kernels.name_tables import TRANSFORMERS
from skyrun.planning.published import transformer_table
from skyrun.tasks import MODELS, TASKS, TaskSpec, tasks_in

_ROLES = {"wan": "transformer", "t5encoder": "text_encoder", "t5": "text_encoder", "clip": "image_encoder"}
_SAFETENSORS = {b'"decoder.conv1.weight"': "vae", b"feature_extractor.conv_layers": "audio_encoder"}
_TOKENIZERS = ("tokenizer.huggingface.json", "tokenizer.ggml.tokens")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_QUANT = re.compile(r"[A-Z0-9_]{1,16}")
_TYPE_IN_NAME = re.compile(r"(?<![A-Z0-9])(I?Q\d(_[A-Z0-9]+)*|BF16|F16|F32)(?![A-Z0-9])")
_ENCODER_QUANT = "Q8_0"  # the smallest type with a negligible error for encoders
_READERS = 8  # headers that are downloaded at the same time


@dataclass(frozen=True)
class RemoteModel:
    """A file that can be used without conversion.

    quant: its recipe, or "". task: what it was made for, or "". by_path: whether only its path states the task.
    refused: why it cannot be used, or "".
    """

    file: RemoteFile
    role: str
    quant: str
    task: str = ""
    by_path: bool = False
    refused: str = ""

    @property
    def base(self) -> str:
        """The type of most of its matrices; "" if it is unknown."""
        return _base(self.quant)


def look(repository: Repository) -> list[RemoteModel]:
    """Describe the files of a repository that need no conversion. Reads the header of each."""
    files = [file for file in repository.files if _may_be_used(file)]
    readers = ThreadPoolExecutor(_READERS)
    try:
        heads = readers.map(lambda file: read_start(file, HEAD_BYTES), files)
        models = [_described(file, data) for file, data in zip(files, heads, strict=True)]
    finally:  # after an interrupt, start no more downloads
        readers.shutdown(wait=False, cancel_futures=True)
    return [model for model in models if model.role]


def _may_be_used(file: RemoteFile) -> bool:
    return file.name.endswith(".gguf") or (file.name.endswith(".safetensors") and not file.folder)


def _described(file: RemoteFile, data: bytes) -> RemoteModel:
    head = read_head(data)
    match = _transformer(head)
    role = _role(data, head, match)
    if file.name.endswith(".safetensors"):
        usable = role == "vae" or b'"skyrun"' in data  # files with other tensor names have to be converted
        return RemoteModel(file, role if usable else "", "")
    task, by_path, fits = _task(head, match, file.path) if role == "transformer" else ("", False, True)
    refused = ""
    if head.unknown_type is not None:
        refused = f"has tensors of a type that skyrun does not read, number {head.unknown_type}"
    elif role == "text_encoder" and not {*head.arrays, *head.values}.intersection(_TOKENIZERS):
        refused = "has no tokenizer"
    elif _SPLIT.search(file.name):
        refused = "is one part of a split model"
    elif not fits:
        refused = "does not have the shape of a model that skyrun runs"
    return RemoteModel(file, role, _quant(head, file.name), task, by_path, refused)


def _transformer(head: Head) -> Match | None:
    return next(iter(recognise(head.shapes, TRANSFORMERS)), None)


def _role(data: bytes, head: Head, match: Match | None) -> str:
    """The role of a file by its first bytes; "" if it is not part of a model."""
    if data[:4] == b"GGUF":
        return "transformer" if match else _ROLES.get(head.text("general.architecture"), "")
    return next((role for mark, role in _SAFETENSORS.items() if mark in data), "")


def roles_in(folder: Path) -> set[str]:
    """The roles of the files in a folder."""
    roles = set()
    for path in folder.iterdir():
        if path.suffix in (".gguf", ".safetensors") and path.is_file():
            with open(path, "rb") as file:
                data = file.read(HEAD_BYTES)
            head = read_head(data)
            roles.add(_role(data, head, _transformer(head)))
    return roles


def _task(head: Head, match: Match | None, path: str) -> tuple[str, bool, bool]:
    """The task of a transformer, whether only its path states it, and whether its shape fits any task.

    The task is the one that the header states, or the only one that fits the tensors, or the one in the path.
    """
    sizes = match.check(head.shapes, {})[0] if match else {}

    def fits(spec: TaskSpec) -> bool:
        return match is None or (
            transformer_table(spec) is match.table and sizes.get("in", spec.dims["in"]) == spec.dims["in"]
        )

    fitting = [task for task, models in MODELS.items() if any(map(fits, models))]
    stated = head.text("skyrun.task")
    if stated in TASKS or len(fitting) < 2:
        return stated if stated in TASKS else "".join(fitting), False, bool(fitting)
    words = [task for task in tasks_in(path) if task in fitting]
    return (words[0], True, True) if len(words) == 1 else ("", False, True)


def _quant(head: Head, name: str) -> str:
    """The recipe of a file: as its header states, or that of its name or file type if its tensors agree."""
    stated = head.text("skyrun.quant").upper()
    if _QUANT.fullmatch(stated):
        return stated
    main = head.main_type
    number = head.values.get("general.file_type")
    by_number = next((quant for quant, recipe in RECIPES.items() if recipe.file_type == number), "")
    for quant in (_type_in(name), by_number):
        if quant and (not main or _base(quant) == main):
            return quant
    return main


def _base(quant: str) -> str:
    """The type of most matrices of a recipe; "" if it is unknown."""
    return RECIPES[quant].base if quant in RECIPES else quant if quant in FORMATS else ""


def _type_in(name: str) -> str:
    found = [match[0] for match in _TYPE_IN_NAME.finditer(name.upper())]
    return found[-1] if found and _QUANT.fullmatch(found[-1]) else ""


def transformers(models: Iterable[RemoteModel], task: str) -> list[RemoteModel]:
    """The transformers for a task; "" stands for any. If some state the task, only those."""
    fitting = [model for model in models if model.role == "transformer" and (not task or model.task in ("", task))]
    return [model for model in fitting if task and model.task == task] or fitting


def quants(models: Iterable[RemoteModel], task: str = "") -> list[str]:
    """The types of the transformers that can be used."""
    return sorted({model.quant for model in transformers(models, task) if not model.refused})


def choose(repo: str, models: list[RemoteModel], quant: str, task: str) -> RemoteModel:
    """The transformer of a type. Raises SkyrunError if there is none, or several.

    Args:
        repo: The name of the repository, for messages.
        models: Its files.
        quant: The type.
        task: The task; "" stands for any.
    """
    fitting = [model for model in transformers(models, task) if model.quant == quant]
    usable = [model for model in fitting if not model.refused]
    if not usable:
        raise _none(repo, models, quant, task, fitting)
    if len(usable) > 1:
        raise _several(repo, usable, quant)
    return usable[0]


def _none(repo: str, models: list[RemoteModel], quant: str, task: str, refused: list[RemoteModel]) -> SkyrunError:
    if refused and _SPLIT.search(refused[0].file.name):
        hint = "choose another type or repository, or join them with llama-gguf-split --merge"
        return SkyrunError(f"{repo} has its {quant} transformer in several files", hint, BAD_INPUT)
    if refused:
        message = f"{refused[0].file.path} of {repo} cannot be used: it {refused[0].refused}"
        return SkyrunError(message, "choose another type or repository", BAD_INPUT)
    what = f"{quant} transformer" + f" for {task}" * bool(task)
    there = ", ".join(quants(models, task)) or "none that can be used"
    return SkyrunError(f"{repo} has no {what}", f"it has {there}", MODEL_MISSING)


def _several(repo: str, models: list[RemoteModel], quant: str) -> SkyrunError:
    names = ", ".join(model.file.path for model in models)
    hint = "fetch one of them by hand, and give its path with --model"
    if len(tasks := {model.task for model in models}) == len(models):
        hint = f"say which with --task {' or '.join(sorted(tasks))}"
    return SkyrunError(f"{repo} has several {quant} transformers: {names}", hint, BAD_INPUT)


def companions(models: list[RemoteModel], quant: str = "") -> list[RemoteModel]:
    """One file for each other role. quant: the type of the encoders, by default one with a negligible error."""
    wanted = (quant or _ENCODER_QUANT, "")
    usable = [model for model in models if model.role != "transformer" and not model.refused]
    chosen: dict[str, RemoteModel] = {}
    for model in sorted(usable, key=lambda model: (model.quant not in wanted, -model.file.nbytes)):
        chosen.setdefault(model.role, model)
    return list(chosen.values())


def nearest_better(models: Iterable[RemoteModel], quant: str, most: str) -> list[RemoteModel]:
    """Models with a type in a range, the requested type first, then the smallest.

    Args:
        models: The models to choose from.
        quant: The requested type, and the fewest bits.
        most: The type with the most bits.
    """
    fitting = [model for model in models if not model.refused and _bits(quant) <= _bits(model.quant) <= _bits(most)]
    return sorted(fitting, key=lambda model: (model.quant != quant, _bits(model.quant), model.file.nbytes))


def _bits(quant: str) -> float:
    """Bits per weight of a recipe; 0 if it is unknown."""
    return FORMATS[base].bits_per_weight if (base := _base(quant)) else 0.0
