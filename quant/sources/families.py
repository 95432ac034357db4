"""Recognise the models in a checkpoint by their tensors: each one's role, its tensors in order, and its metadata."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.names import Match, brief, recognise, strays
from skyrun.kernels.name_tables import TABLES, TASKS
from skyrun.quant.sources import describe
from skyrun.quant.sources.checkpoint import SUFFIXES, Part, open_parts, snapshot
from skyrun.quant.sources.foreign import Unsupported
from skyrun.quant.sources.source import READABLE, SourceTensor
from skyrun.quant.sources.tokenizer import tokenizer_keys

NOTHING_COMING: Mapping[Path, int] = MappingProxyType({})
_CHECK = "check again that this is a SkyReels-V3 model, or download the published one with skyrun pull TASK"


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of an output file. shape: the source's, with axes restored that are merged there or have length 1."""

    name: str
    shape: tuple[int, ...]
    source: SourceTensor


@dataclass(frozen=True)
class Family:
    """One model of a checkpoint.

    role: transformer, text_encoder, vae, image_encoder or audio_encoder. task: of a transformer; "" if it is unknown.
    basename: what its file is named after. architecture: its name in GGUF; "" if it becomes a safetensors file.
    tensors: in the order of the output file, where each block is contiguous and blocks are in execution order.
    metadata: of the output file.
    """

    role: str
    task: str
    basename: str
    architecture: str
    tensors: tuple[ModelTensor, ...]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """The models in a source. notes: sentences about what is not used."""

    source: Path
    families: tuple[Family, ...]
    notes: tuple[str, ...]


_MOST_LINES, _MOST_HINTS = 20, 4  # that an error about several models shows
_TASKS = ("", *TASKS)
_ROLES = [table.role for table in TABLES]


@dataclass(frozen=True)
class _Model:
    """A family that was recognised in a part. unknown: tensors under its prefix that the family does not have."""

    part: Part
    match: Match
    unknown: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        return self.match.table.role

    @property
    def task(self) -> str:
        return describe.task_of(self.part, self.match) if self.role == "transformer" else ""

    @property
    def preference(self) -> int:
        suffix = self.part.files[0].suffix
        return SUFFIXES.index(suffix) if suffix in SUFFIXES else len(SUFFIXES)


def find_families(source: Path, coming: Mapping[Path, int] = NOTHING_COMING) -> Found:
    """Find the models in a folder or a file. Only headers are read.

    coming: the final sizes of files of which only the header has been downloaded.

    Raises one SkyrunError that lists everything that prevents a conversion.
    """
    source = snapshot(source)
    parts, errors = open_parts(source, coming)
    strangers: list[str] = []
    groups: dict[tuple[str, str], list[_Model]] = defaultdict(list)
    for part in parts:
        matches = recognise(part.tensors, TABLES)
        unknown, others = strays(part.tensors, matches)
        for match in matches:
            model = _Model(part, match, tuple(unknown))
            groups[model.role, model.task].append(model)
            unknown = []  # reported with the first match only
        if others:
            strangers.append(f"not used: {_some(others)} in {part.label}")
    notes = brief(strangers, "are not used either")
    if not groups and not errors:
        raise _nothing(source, notes)
    families = []
    for (_, task), models in sorted(groups.items(), key=lambda group: _place(*group[0])):
        families += _choose(source, task, models, notes, errors)
    there = {family.role for family in families}
    for error in [error for error in errors if isinstance(error, Unsupported)]:
        if families and (not error.role or error.role in there):
            errors.remove(error)
            notes.append(f"not used: {error.message}")
    if errors:
        raise _all(source, errors)
    return Found(source, tuple(families), tuple(notes))


def _place(role: str, task: str) -> tuple[int, int]:
    return _ROLES.index(role), _TASKS.index(task)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def _nothing(source: Path, notes: list[str]) -> SkyrunError:
    if source.is_dir() and not notes:
        inside = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
        return SkyrunError(
            f"{source} is not a checkpoint: it holds {inside}",
            f"expected the folder of a SkyReels-V3 repository, or files that end in {', '.join(SUFFIXES)}",
        )
    title = f"{source} holds no model that skyrun knows"
    return SkyrunError("; ".join([title, *notes]), "expected SkyReels-V3: transformer, UMT5, Wan VAE, CLIP, wav2vec2")


def _all(source: Path, errors: list[SkyrunError]) -> SkyrunError:
    """The error itself if there is only one, else one error with the lines of all."""
    if len(errors) == 1:
        return errors[0]
    lines = []
    for error in errors:
        title, *listed = error.message.splitlines()
        lines += [line.removeprefix("  - ") for line in listed] or [title]
    hints = list(dict.fromkeys(error.hint for error in errors if error.hint))
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"and {len(lines) - _MOST_LINES} more lines like these"]
    return SkyrunError.listing(f"{source} cannot be converted", lines, "; ".join(hints[:_MOST_HINTS]))


def _choose(source: Path, task: str, models: list[_Model], notes: list[str], errors: list[SkyrunError]) -> list[Family]:
    """Choose the model of a role and a task: the best format of those that can be used.

    Models that are not used are added to `notes`. If none can be used, or two different ones can, that is added to
    `errors`.
    """
    usable: list[tuple[_Model, Family]] = []
    failed: list[tuple[_Model, SkyrunError]] = []
    for model in sorted(models, key=lambda model: model.preference):
        try:
            usable.append((model, _family(source, model)))
        except SkyrunError as error:
            failed.append((model, error))
    if not usable:
        errors += [error for _, error in failed]
        return []
    (best, family), *others = usable
    for other, _ in others:
        if other.part.folder == best.part.folder and other.preference > best.preference:
            notes.append(f"not used: {other.part.label}, the same {best.role} is in {best.part.label}")
        else:
            what = f"two {task} {best.role}s" if task else f"two {best.role}s"
            message = f"there are {what}: {best.part.label} and {other.part.label}"
            errors.append(SkyrunError(message, "move one of them away, or give the file to convert"))
    notes += [f"not used: {model.part.label}, {error.message.splitlines()[0]}" for model, error in failed]
    if best.role == "transformer" and (said := describe.unknown_class(best.part, best.match)):
        notes.append(said)
    return [family]


def _family(source: Path, model: _Model) -> Family:
    part, match = model.part, model.match
    shapes = {name: tensor.shape for name, tensor in part.tensors.items()}
    dims, problems = match.check(shapes, describe.known_dims(part))
    strange = [f"{name} {list(shapes[name])} is not a tensor of this model" for name in model.unknown]
    problems = [f"{part.label}: {problem}" for problem in (*brief(strange, "are not of this model"), *problems)]
    problems += _unreadable([part.tensors[name] for name in match.names.values()])
    if problems:
        raise SkyrunError.listing(f"{part.label} does not match its model", problems, _CHECK)
    tensors = tuple(
        ModelTensor(row.name(), row.sizes(dims) or (), part.tensors[name])
        for row in match.table.expand(match.layers)
        if (name := match.file_name(row)) in part.tensors
    )
    basename, architecture, metadata = _described(source, model, dims)
    return Family(model.role, model.task, basename, architecture, tensors, metadata)


def _unreadable(tensors: list[SourceTensor]) -> list[str]:
    """A line for each type that cannot be read. int8 can be read only with scales."""
    kinds: dict[str, list[SourceTensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.dtype not in READABLE or (tensor.dtype == "I8" and tensor.scale is None):
            kinds[tensor.dtype].append(tensor)
    lines = []
    for dtype, (first, *more) in kinds.items():
        known = f"expected {', '.join(READABLE)}" + " with scales" * (dtype == "I8")
        if more:
            lines.append(f"{len(more) + 1} tensors are {dtype}, such as {first.name} in {first.file}; {known}")
        else:
            lines.append(f"{first.name} in {first.file} is {dtype}, {known}")
    return lines


def _described(source: Path, model: _Model, dims: Mapping[str, int]) -> tuple[str, str, dict[str, Any]]:
    """The basename, architecture and metadata of a model's output file."""
    part = model.part
    match model.role:
        case "transformer":
            return describe.basename(part, model.task), "wan", describe.transformer(part, dims, model.task)
        case "text_encoder":
            return (
                "umt5-encoder",
                "t5encoder",
                describe.text_encoder(part, dims, tokenizer_keys(source, part, dims["vocab"])),
            )
        case "image_encoder":
            return "clip-vision", "clip", describe.image_encoder(part, dims)
        case "audio_encoder":
            return "wav2vec2", "", describe.audio_encoder(part, dims)
        case _:
            return "wan-vae", "", describe.vae(part, dims)
