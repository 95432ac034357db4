"""What a conversion will write, decided to the byte before it begins."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from skyrun.quant.source import SourceTensor, Stamp


@dataclass(frozen=True)
class Settings:
    """What is asked of a conversion.

    quant: recipe of the transformer, or of what there is if there is none. text_encoder_quant: of the text encoder, by
    default as quant but not below Q8_0. type_rules: "regex=TYPE" each; the first that matches a matrix of a transformer
    wins over the recipe. target_size: bytes that a transformer's file may have, instead of a recipe. imatrix: a file of
    importances, which weigh a transformer's errors.
    """

    quant: str = "Q8_0"
    text_encoder_quant: str | None = None
    type_rules: tuple[str, ...] = ()
    target_size: int | None = None
    imatrix: Path | None = None


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of an output file: where it comes from, what it becomes, and where it will lie."""

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

    errors: noise over signal in the output of each matrix that a recipe or a rule gives its type, by name, as sampled.
    sources: the files that are read, and their stamps when they were looked at. matrices: how many tensors a recipe or
    a rule gives a type.
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
        """Relative error of a matrix's output: root mean square over the matrices, each counting by its weights."""
        weights = {tensor.name: tensor.source.numel for tensor in self.tensors if tensor.name in self.errors}
        total = sum(self.errors[name] * count for name, count in weights.items())
        return (total / sum(weights.values())) ** 0.5 if weights else 0.0

    @property
    def weighted(self) -> bool:
        """Whether errors count by importance."""
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

    notes: what a person should know before it begins. missing: roles of models that the transformers need and that
    are neither among the files nor in their folder.
    """

    source: Path
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        files = [file.summary() for file in self.files]
        lists = {"notes": list(self.notes), "missing": list(self.missing)}
        return {"source": str(self.source), "files": files} | lists
