"""Plan a conversion: find the models in a source, choose types, measure their errors, lay out the files."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from gguf import naming_convention, size_label
from torch import Tensor

from skyrun.kernels import block_format
from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.recipes import RECIPES, find_recipe
from skyrun.quant.choose.importance import Importance, read_importance
from skyrun.quant.choose.recipes import (
    KEPT,
    Choice,
    TypeRule,
    choose_types,
    default_encoder_quant,
    is_quantizable,
    keep_type,
    label_of,
    parse_rule,
)
from skyrun.quant.choose.sampled_error import sampled_errors
from skyrun.quant.choose.target_size import candidates, fit, influence, size_text
from skyrun.quant.container import Entry, Layout, gguf_layout, safetensors_layout
from skyrun.quant.merge import check_merge, merged
from skyrun.quant.partial import partial_path
from skyrun.quant.plan import Conversion, PlannedFile, PlannedTensor, Settings
from skyrun.quant.sources.families import NOTHING_COMING, Family, ModelTensor, find_families
from skyrun.quant.sources.missing import missing_roles, missing_text
from skyrun.quant.sources.source import stamp
from skyrun.quant.threads import one_thread

# Called with the number of matrices that have been measured, and the total.
OnMeasured = Callable[[int, int], None]


def plan_conversion(
    source: Path,
    out: Path,
    settings: Settings,
    on_measured: OnMeasured = lambda *_: None,
    coming: Mapping[Path, int] = NOTHING_COMING,
) -> Conversion:
    """Decide every file, name and type. Reads headers, and some rows to measure errors; writes nothing.

    Args:
        source: the checkpoint, a folder or a file.
        out: the folder for the converted files.
        settings: what the user asks for.
        on_measured: called after the error of each matrix has been measured.
        coming: the final sizes of files of which only the header has been downloaded; no errors are measured on them.

    Raises SkyrunError for anything that cannot be converted.
    """
    quant, asked = settings.quant.upper(), settings.text_encoder_quant
    for name in (quant, asked or quant):
        find_recipe(name)
    rules = tuple(parse_rule(text) for text in settings.type_rules)
    importance = read_importance(settings.imatrix) if settings.imatrix else None
    found = find_families(source, coming)
    _check_out(source, out)
    transformers = [family for family in found.families if family.role == "transformer"]
    check_merge(transformers, settings.loras)
    _check_about_transformers(transformers, settings, rules)
    encoder = default_encoder_quant(quant) if transformers else quant
    quants = {"transformer": quant, "text_encoder": (asked or encoder).upper(), "image_encoder": encoder}
    planner = _Planner(out, rules, settings, importance, coming)
    families, notices = [*found.families], [*found.notes]
    for place, family in enumerate(families):
        if settings.loras and family.role == "transformer":
            families[place], about = merged(family, settings.loras)
            notices += about
    total = sum(len(planner.matrices(family)) for family in families)
    counter = itertools.count(1)
    files = tuple(
        planner.plan(family, quants.get(family.role, ""), lambda: on_measured(next(counter), total))
        for family in families
    )
    _check_paths(files)
    missing = missing_roles(files, out)
    about_missing = missing_text(files, source, missing)
    notes = (*notices, *_notes(out, files, settings), *([about_missing] if about_missing else []))
    return Conversion(source, files, notes, missing)


def _check_out(source: Path, out: Path) -> None:
    """Raise SkyrunError if `out` is inside the checkpoint: the next conversion would find every model twice."""
    if source.is_dir() and (out.resolve() == source.resolve() or source.resolve() in out.resolve().parents):
        raise SkyrunError(
            f"{out} lies in the checkpoint {source}, where the files would be taken for parts of it later",
            "choose a folder outside with -o",
        )


def _check_about_transformers(transformers: list[Family], settings: Settings, rules: tuple[TypeRule, ...]) -> None:
    only = {"--target-size": settings.target_size, "--type-rule": rules, "--imatrix": settings.imatrix}
    if not transformers and (idle := [option for option, value in only.items() if value]):
        raise SkyrunError(f"{idle[0]} is about a transformer, the source has none", f"leave out {idle[0]}")
    matrices = [tensor for family in transformers for tensor in family.tensors if len(tensor.shape) == 2]
    problems = [
        f"the rule {rule.pattern.pattern!r} matches no matrix of a transformer"
        for rule in rules
        if not any(rule.matches(tensor) for tensor in matrices)
    ]
    if problems:
        hint = f"names are like {matrices[len(matrices) // 2].name}; vectors, such as norms and biases, stay F32"
        raise SkyrunError.listing("some rules do nothing", problems, hint)


def _check_paths(files: tuple[PlannedFile, ...]) -> None:
    sources = {source.resolve() for file in files for source in file.sources}
    problems = [f"{file.path} is itself the source" for file in files if file.path.resolve() in sources]
    twice = [path for path, count in Counter(file.path for file in files).items() if count > 1]
    problems += [f"{path} would be written twice" for path in twice]
    if problems:
        hint = "choose another folder with -o, or convert one at a time"
        raise SkyrunError.listing("files would be lost", problems, hint)


def _notes(out: Path, files: tuple[PlannedFile, ...], settings: Settings) -> Iterator[str]:
    """Notes about results that might surprise the user."""
    for file in files:
        if file.path.exists():
            yield f"{file.path} is there already and will be replaced"
        lossy = {t.source.dtype for t in file.tensors if t.name in file.errors and t.source.dtype not in KEPT}
        if lossy - {tensor.type for tensor in file.tensors}:
            yield f"the source of {file.path.name} is itself {', '.join(sorted(lossy))}: errors are counted from there"
        if file.weighted and all(t.type in (*KEPT, "Q8_0") for t in file.tensors):
            yield f"{file.path.name} has only types that importance does not change"
        weighed = sum(tensor.importance is not None for tensor in file.tensors)
        if settings.imatrix and 0 < weighed < file.matrices:
            rest = f"the other {file.matrices - weighed} are encoded as without it"
            yield f"{settings.imatrix} covers {weighed} of {file.matrices} matrices of {file.path.name}: {rest}"
    mine = {partial_path(file.path) for file in files}
    for path in sorted(out.glob("*.partial")):
        if path not in mine:
            yield f"{path} is left from another conversion that was not finished: delete it if you do not need it"


@dataclass(frozen=True)
class _Planner:
    """Plans one file after another with the same settings."""

    out: Path
    rules: tuple[TypeRule, ...]
    settings: Settings
    importance: Importance | None
    coming: Mapping[Path, int]

    def plan(self, family: Family, quant: str, on_measured: Callable[[], None]) -> PlannedFile:
        if not family.architecture:  # wide types first, so that each tensor lies at a multiple of its width
            family = replace(family, tensors=tuple(sorted(family.tensors, key=_width, reverse=True)))
        transformer = family.role == "transformer"
        choices = choose_types(family.tensors, family.role, quant, self.rules if transformer else ())
        weights = self._weights(family) if transformer and self.importance else {}
        target = self.settings.target_size if transformer else None
        errors = {}
        for tensor in self.matrices(family):
            types = [choices[tensor.name].type] if target is None or self._ruled(tensor) else candidates(tensor)
            if tensor.source.file in self.coming:
                continue
            with one_thread():
                errors[tensor.name] = sampled_errors(tensor, types, weights.get(tensor.name))
            on_measured()
        label = size_text(target) if target is not None else quant
        if quant and target is None and not any(self._ruled(tensor) for tensor in self.matrices(family)):
            label = label_of(quant, self.matrices(family), choices)
        if target is not None:
            choices |= self._fit(family, choices, errors, label, target)
        chosen = {name: row[choices[name].type] for name, row in errors.items()}
        return self._file(family, label, choices, chosen, weights)

    def matrices(self, family: Family) -> list[ModelTensor]:
        """The matrices whose type comes from a recipe or a rule."""
        ruled = family.role == "transformer"
        return [t for t in family.tensors if is_quantizable(t, family.role) or (ruled and self._ruled(t))]

    def _loras(self, family: Family) -> tuple[tuple[Path, float], ...]:
        """The adapters that are merged into a model."""
        return self.settings.loras if family.role == "transformer" else ()

    def _ruled(self, tensor: ModelTensor) -> bool:
        return any(rule.matches(tensor) for rule in self.rules)

    def _weights(self, family: Family) -> dict[str, Tensor]:
        """The importance of each matrix's columns, by name. Raises SkyrunError if it belongs to another model."""
        assert self.importance
        path, matrices = self.settings.imatrix, self.matrices(family)
        means = {tensor.name: self.importance.mean(tensor.name) for tensor in matrices}
        known = {name: mean for name, mean in means.items() if mean is not None}
        if not known:
            raise SkyrunError(f"{path} says nothing about any matrix of {family.basename}", "calibrate this model")
        for tensor in matrices:
            if tensor.name in known and len(known[tensor.name]) != tensor.shape[-1]:
                raise SkyrunError(
                    f"{path} was collected from another model: it has {len(known[tensor.name])} columns for "
                    f"{tensor.name}, which has {tensor.shape[-1]}",
                    "calibrate this model",
                )
        return known

    def _fit(
        self, family: Family, choices: dict[str, Choice], errors: dict[str, dict[str, float]], label: str, target: int
    ) -> dict[str, Choice]:
        """The choices that meet the target size with the least error, for all matrices that have been measured."""
        free = {tensor.name: tensor for tensor in family.tensors if tensor.name in errors}
        sizes = {name: {type: _padded(_nbytes(free[name], type)) for type in row} for name, row in errors.items()}
        whole = self._layout(family, label, choices).nbytes
        rest = whole - sum(_padded(_nbytes(tensor, choices[name].type)) for name, tensor in free.items())
        influences = {name: influence(tensor) for name, tensor in free.items()}
        return {name: Choice(type) for name, type in fit(sizes, errors, influences, rest, target).items()}

    def _file(
        self,
        family: Family,
        label: str,
        choices: dict[str, Choice],
        errors: dict[str, float],
        weights: dict[str, Tensor],
    ) -> PlannedFile:
        layout = self._layout(family, label, choices)
        planned = []
        for tensor, offset in zip(family.tensors, layout.offsets, strict=True):
            name, choice = tensor.name, choices[tensor.name]
            where = (choice.type, offset, _nbytes(tensor, choice.type), choice.fallback)
            planned.append(PlannedTensor(name, tensor.shape, tensor.source, *where, weights.get(name)))
        suffix = ".gguf" if family.architecture else ".safetensors"
        tuned = "-".join(path.stem for path, _ in self._loras(family)) or None
        name = naming_convention(None, family.basename, tuned, None, _size_label(family), label or None) + suffix
        read = {tensor.source.file for tensor in family.tensors} | {path for path, _ in self._loras(family)}
        sources = {file: stamp(file) for file in sorted(read)}
        facts = (family.role, family.task, layout.header, layout.nbytes)
        count = len(self.matrices(family))
        return PlannedFile(self.out / name, *facts, tuple(planned), errors, sources, count)

    def _layout(self, family: Family, label: str, choices: dict[str, Choice]) -> Layout:
        types = [choices[tensor.name].type for tensor in family.tensors]
        entries = [
            Entry(t.name, t.shape, type, _nbytes(t, type)) for t, type in zip(family.tensors, types, strict=True)
        ]
        if not family.architecture:
            return safetensors_layout(family.metadata, entries)
        return gguf_layout(family.architecture, family.metadata | self._about(family, label, choices), entries)

    def _about(self, family: Family, label: str, choices: dict[str, Choice]) -> dict[str, Any]:
        """The metadata that identifies the file and says how it was made, beside the model's dims."""
        weights: Counter[str] = Counter()
        for tensor in self.matrices(family):
            weights[choices[tensor.name].type] += tensor.source.numel
        main = label if label in RECIPES else weights.most_common(1)[0][0]
        size = _size_label(family)
        about: dict[str, Any] = {
            "general.name": f"{family.basename} {size}",
            "general.basename": family.basename,
            "general.size_label": size,
            "general.file_type": RECIPES[main].file_type,
            "general.quantization_version": 2,
            "general.quantized_by": "skyrun",
            "skyrun.quant": label,
            "skyrun.source_types": ", ".join(sorted({tensor.source.dtype for tensor in family.tensors})),
        }
        if family.role == "transformer" and self.rules:
            about["skyrun.type_rules"] = json.dumps(list(self.settings.type_rules))
        if loras := self._loras(family):
            about["general.finetune"] = ", ".join(path.stem for path, _ in loras)
            about["skyrun.loras"] = json.dumps([[path.name, strength] for path, strength in loras])
        if family.role == "transformer" and self.importance and self.settings.imatrix:
            about["quantize.imatrix.file"] = self.settings.imatrix.name
            about["quantize.imatrix.entries_count"] = len(self._weights(family))
            about["quantize.imatrix.chunks_count"] = self.importance.chunks
        return about


def _nbytes(tensor: ModelTensor, type: str) -> int:
    cols = tensor.shape[-1] if tensor.shape else 1
    return prod(tensor.shape) // cols * block_format(type).row_bytes(cols)


def _width(tensor: ModelTensor) -> float:
    return block_format(keep_type(tensor)).bits_per_weight


def _padded(nbytes: int) -> int:
    return -(-nbytes // 32) * 32


def _size_label(family: Family) -> str:
    return size_label(sum(tensor.source.numel for tensor in family.tensors), 0, 0, 0)
