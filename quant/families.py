"""The models in a checkpoint, recognised by their tensors: what each is, its tensors in order, what its file says."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.name_tables import (
    CLIP_VISION,
    UMT5_ENCODER,
    WAN_AUDIO_TRANSFORMER,
    WAN_TRANSFORMER,
    WAN_VAE,
    WAV2VEC2,
)
from skyrun.kernels.names import Match, recognise, strays
from skyrun.quant import describe
from skyrun.quant.checkpoint import SUFFIXES, Part, open_parts
from skyrun.quant.source import READABLE, SourceTensor
from skyrun.quant.tokenizer import find_tokenizer

NOTHING_COMING: Mapping[Path, int] = MappingProxyType({})
_AGAIN = "download the checkpoint again, or check that it is a SkyReels-V3 repository"


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of a file to be written. shape: the source's but for axes of length 1, or merged ones restored."""

    name: str
    shape: tuple[int, ...]
    source: SourceTensor


@dataclass(frozen=True)
class Family:
    """One model of a checkpoint.

    role: transformer, text_encoder, vae, image_encoder or audio_encoder. task: of a transformer, "" where nothing
    tells. architecture: GGUF's name for it, "" for a safetensors file. tensors: in the order of the file, blocks whole
    and in execution order.
    """

    role: str
    task: str
    basename: str
    architecture: str
    tensors: tuple[ModelTensor, ...]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What a source holds. notes: what was there and is not used, in words."""

    source: Path
    families: tuple[Family, ...]
    notes: tuple[str, ...]


_TASKS = ("", "r2v", "v2v", "shot", "a2v")
_TABLES = (WAN_TRANSFORMER, WAN_AUDIO_TRANSFORMER, UMT5_ENCODER, WAN_VAE, CLIP_VISION, WAV2VEC2)
_ROLES = [table.role for table in _TABLES]


@dataclass(frozen=True)
class _Model:
    """A family that was recognised in a part."""

    part: Part
    match: Match

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
    """Look into a folder or a file; reads headers only. SkyrunError lists all that keeps it from being converted.

    coming: bytes that files will have of which only the header is there yet.
    """
    parts, errors = open_parts(source, coming)
    notes: list[str] = []
    models: list[_Model] = []
    for part in parts:
        matches = recognise(part.tensors, _TABLES)
        models += [_Model(part, match) for match in matches]
        unknown, others = strays(part.tensors, matches)
        errors += [
            SkyrunError(f"{part.label}: {name} {list(part.tensors[name].shape)} is not a tensor of this model", _AGAIN)
            for name in unknown
        ]
        if others:
            notes.append(f"not used: {_some(others)} in {part.label}")
    if not models and not errors:
        raise _nothing(source, notes)
    families = []
    for model in _choose(models, notes, errors):
        try:
            families.append(_family(source, model))
        except SkyrunError as error:
            errors.append(error)
    if errors:
        raise _all(source, errors)
    return Found(source, tuple(families), tuple(notes))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def _nothing(source: Path, notes: list[str]) -> SkyrunError:
    if source.is_dir() and not notes:
        inside = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
        return SkyrunError(
            f"{source} is no checkpoint: it holds {inside}",
            f"expected the folder of a SkyReels-V3 repository, or files that end in {', '.join(SUFFIXES)}",
        )
    title = f"{source} holds no model that skyrun knows"
    return SkyrunError("; ".join([title, *notes]), "expected SkyReels-V3: transformer, UMT5, Wan VAE, CLIP, wav2vec2")


def _all(source: Path, errors: list[SkyrunError]) -> SkyrunError:
    """The one error, or a list of all that they list."""
    if len(errors) == 1:
        return errors[0]
    lines = []
    for error in errors:
        title, *listed = error.message.splitlines()
        lines += [line.removeprefix("  - ") for line in listed] or [title]
    hints = list(dict.fromkeys(error.hint for error in errors if error.hint))
    return SkyrunError.listing(f"{source} cannot be converted", lines, "; ".join(hints))


def _choose(models: list[_Model], notes: list[str], errors: list[SkyrunError]) -> list[_Model]:
    """One model for each role and task. Where a folder has one in several formats, the best of them."""
    groups = defaultdict(list)
    for model in models:
        groups[model.role, model.task].append(model)
    chosen = []
    for (role, task), group in groups.items():
        group.sort(key=lambda model: model.preference)
        best, *others = group
        for other in others:
            if other.part.folder == best.part.folder and other.preference > best.preference:
                notes.append(f"not used: {other.part.label}, the same {role} is in {best.part.label}")
            else:
                what = f"two {task} {role}s" if task else f"two {role}s"
                errors.append(
                    SkyrunError(
                        f"there are {what}: {best.part.label} and {other.part.label}",
                        "move one of them away, or give the file to convert",
                    )
                )
        chosen.append(best)
    return sorted(chosen, key=lambda model: (_ROLES.index(model.role), _TASKS.index(model.task)))


def _family(source: Path, model: _Model) -> Family:
    part, match = model.part, model.match
    shapes = {name: tensor.shape for name, tensor in part.tensors.items()}
    dims, problems = match.check(shapes, describe.known_dims(part))
    problems = [f"{part.label}: {problem}" for problem in problems]
    problems += [
        f"{tensor.name} in {tensor.file} is {tensor.dtype}, expected {', '.join(READABLE)}"
        for tensor in (part.tensors[name] for name in match.names.values())
        if tensor.dtype not in READABLE
    ]
    if problems:
        raise SkyrunError.listing(f"{part.label} does not match its model", problems, _AGAIN)
    tensors = tuple(
        ModelTensor(row.name(), row.sizes(dims) or (), part.tensors[match.file_name(row)])
        for row in match.table.expand(match.layers)
    )
    basename, architecture, metadata = _described(source, model, dims)
    return Family(model.role, model.task, basename, architecture, tensors, metadata)


def _described(source: Path, model: _Model, dims: Mapping[str, int]) -> tuple[str, str, dict[str, Any]]:
    """Basename, architecture and metadata."""
    part = model.part
    match model.role:
        case "transformer":
            basename = f"SkyReels-V3-{model.task.upper()}" if model.task else "Wan"
            return basename, "wan", describe.transformer(part, dims, model.task)
        case "text_encoder":
            return "umt5-encoder", "t5encoder", describe.text_encoder(part, dims, find_tokenizer(source, part))
        case "image_encoder":
            return "clip-vision", "clip", describe.image_encoder(part, dims)
        case "audio_encoder":
            return "wav2vec2", "", describe.audio_encoder(part, dims)
        case _:
            return "wan-vae", "", describe.vae(part, dims)
