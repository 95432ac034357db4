"""The plan of a conversion: what it will write, to the byte."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from skyrun.quant.sources.source import SourceTensor, Stamp


@dataclass(frozen=True)
class Settings:
    """What the user asks of a conversion.

    quant: recipe of the transformer, or of the other models if there is no transformer. text_encoder_quant: recipe of
    the text encoder; by default `quant`, but not below Q8_0. type_rules: "regex=TYPE" each; the first one that matches
    a matrix of a transformer takes precedence over the recipe. target_size: how many bytes a transformer's file may
    have, instead of a recipe. imatrix: a file of importances, by which errors of the transformer are weighted.
    loras: adapters that are merged into the transformer, with their strengths.
    """

    quant: str = "Q8_0"
    text_encoder_quant: str | None = None
    type_rules: tuple[str, ...] = ()
    target_size: int | None = None
    imatrix: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of an output file.

    source: where it is read. type, offset, nbytes: in the output file. fallback: why it does not have the type of the
    recipe or rule; empty if it has. importance: float32 [cols], by which its errors are weighted.
    """

    name: str
    shape: tuple[int, ...]
    source: SourceTensor
    type: str
    offset: int
    nbytes: int
    fallback: str
    importance: Tensor | None


@dataclass(frozen=True)
class PlannedFile:
    """An output file.

    errors: noise over signal in the output of each matrix whose type comes from a recipe or a rule, by name, measured
    on a sample. sources: the files that are read, with their stamps at the time of planning. matrices: how many tensors
    have a type that comes from a recipe or a rule.
    """

    path: Path
    role: str
    task: str
    header: bytes
    nbytes: int
    tensors: tuple[PlannedTensor, ...]
    errors: dict[str, float]
    sources: dict[Path, Stamp]
    matrices: int = 0

    @property
    def error(self) -> float:
        """The relative error of a matrix's output: root mean square over all matrices, weighted by their sizes."""
        weights = {tensor.name: tensor.source.numel for tensor in self.tensors if tensor.name in self.errors}
        total = sum(self.errors[name] * count for name, count in weights.items())
        return (total / sum(weights.values())) ** 0.5 if weights else 0.0

    @property
    def weighted(self) -> bool:
        """Whether errors are weighted by importance."""
        return any(tensor.importance is not None for tensor in self.tensors)

    def summary(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "role": self.role,
            "task": self.task,
            "bytes": self.nbytes,
            "tensors": len(self.tensors),
            "types": dict(Counter(tensor.type for tensor in self.tensors)),
            "expected_error": self.error,
            "fallbacks": {tensor.name: tensor.fallback for tensor in self.tensors if tensor.fallback},
        }


@dataclass(frozen=True)
class Conversion:
    """All files that a conversion writes.

    notes: sentences for the user before it begins. missing: roles of models that the transformers need but that are
    neither among the files nor in their folder.
    """

    source: Path
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        files = [file.summary() for file in self.files]
        lists = {"notes": list(self.notes), "missing": list(self.missing)}
        return {"source": str(self.source), "files": files} | lists
