"""Measure the error of every tensor in a file against the checkpoint that it was made from."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from skyrun.kernels.errors import SkyrunError
from skyrun.quant.choose.sampled_error import noise_power
from skyrun.quant.sources.families import Family, ModelTensor, find_families
from skyrun.quant.sources.source import SourceTensor

_PIECE_WEIGHTS = 1 << 21


@dataclass(frozen=True)
class TensorError:
    """The error of a tensor.

    error: root mean square of the error of the layer's output, relative to the output. largest: the largest absolute
    error of a single weight.
    """

    name: str
    type: str
    weights: int
    error: float
    largest: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    path: Path,
    source: Path,
    importance: Callable[[str], Tensor | None] = lambda name: None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> list[TensorError]:
    """Decode all tensors of `path` and compare them with the model in `source` that has the same role.

    Args:
        path: a converted file.
        source: the checkpoint that it was made from.
        importance: returns the mean squares [cols] of a matrix's input channels by its name, or None.
        on_done: called with the number of bytes that were compared so far, and the total.

    Raises SkyrunError if the two are not the same model.
    """
    (written,) = find_families(path).families
    original = _counterpart(written, source)
    by_name = {tensor.name: tensor for tensor in original.tensors}
    total, done, errors = sum(tensor.source.nbytes for tensor in written.tensors), 0, []
    for tensor in written.tensors:
        errors.append(_error(tensor, by_name[tensor.name], importance(tensor.name)))
        done += tensor.source.nbytes
        on_done(done, total)
    return errors


def _counterpart(written: Family, source: Path) -> Family:
    """The model in the source with the same role, task, names and shapes."""
    shapes = {tensor.name: tensor.shape for tensor in written.tensors}
    families = find_families(source).families
    for family in families:
        same_task = not written.task or not family.task or written.task == family.task
        if family.role == written.role and same_task and {t.name: t.shape for t in family.tensors} == shapes:
            return family
    there = ", ".join(f"{family.role} {family.task}".strip() for family in families)
    wanted = f"{written.role} {written.task}".strip()
    raise SkyrunError(
        f"{source} has no {wanted} of the same shapes, it has {there}", "give what the file was made from"
    )


def _error(written: ModelTensor, original: ModelTensor, importance: Tensor | None) -> TensorError:
    noise = signal = largest = 0.0
    ours = written.source
    for decoded, x in _pieces(ours, original.source):
        some_noise, some_signal = noise_power(x, decoded, importance)
        noise, signal = noise + some_noise, signal + some_signal
        largest = max(largest, float((x - decoded).abs().max()))
    error = (noise / signal) ** 0.5 if signal else float(noise > 0)
    return TensorError(written.name, ours.dtype, ours.numel, error, largest)


def _pieces(ours: SourceTensor, theirs: SourceTensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same rows of both tensors, a few at a time."""
    if ours.cols != theirs.cols:  # a convolution whose axes are merged in one of the two; it is small
        yield ours.read().view(1, -1), theirs.read().view(1, -1)
        return
    step = max(1, _PIECE_WEIGHTS // ours.cols)
    for start in range(0, ours.rows, step):
        stop = min(start + step, ours.rows)
        yield ours.read(start, stop), theirs.read(start, stop)
