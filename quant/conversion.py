"""Convert a checkpoint: plan every tensor of every file, then write the files."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from skyrun.kernels.errors import FAILED, SkyrunError
from skyrun.kernels.files.disk import allocated, existing_folder
from skyrun.quant.choose.target_size import parse_size
from skyrun.quant.partial import PartialFile, partial_path, resumable
from skyrun.quant.plan import Conversion, PlannedFile, PlannedTensor, Settings
from skyrun.quant.planner import plan_conversion
from skyrun.quant.sources.source import SourceTensor, Stamp, stamp
from skyrun.quant.worker import Workers, pieces


def check_space(conversion: Conversion) -> None:
    """Raise SkyrunError if the files cannot be written to the folder or do not fit on its disk. Writes nothing."""
    folder = conversion.files[0].path.absolute().parent
    existing = existing_folder(folder)
    if not existing.is_dir():
        message = f"cannot write to the folder {folder}: {existing} is a file"
        raise SkyrunError(message, f"{existing} is not a folder: choose another with -o")
    if not os.access(existing, os.W_OK):
        message = f"cannot write to the folder {folder}: {existing} is not writable"
        raise SkyrunError(message, "choose another with -o, or change its permissions")
    if folders := [str(file.path) for file in conversion.files if file.path.is_dir()]:
        raise SkyrunError(f"{folders[0]} is a folder, but a file of that name has to be written", "move it away")
    needed = sum(file.nbytes - allocated(partial_path(file.path)) for file in conversion.files)
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise SkyrunError(
            f"the converted files need {needed / 1e6:.0f} MB and {existing} has {free / 1e6:.0f} MB free",
            "free some space, choose another folder with -o, or a smaller --quant",
            FAILED,
        )


def write_file(
    file: PlannedFile, device: str = "cpu", workers: int | None = None, source: Path | None = None
) -> Iterator[int]:
    """Write a planned file under a temporary name and rename it when it is complete.

    workers: processes that encode; by default as many as pay. What an interrupted conversion finished is not done
    again; it is the first that is yielded. source: the only file of the source that has to be there; what others give
    is left for further calls, the last of which renames the file.
    """
    try:
        with resumable(file, device) as partial:
            yield sum(tensor.nbytes for tensor in file.tensors if tensor.name in partial.done)
            todo = [tensor for tensor in file.tensors if tensor.name not in partial.done]
            if source is None:
                yield from _encode(todo, file.sources, partial, device, workers)
                return
            here = [tensor for tensor in todo if tensor.source.file == source]
            yield from _encode(here, {source: stamp(source)}, partial, device, workers)
    except OSError as error:
        kept = partial_path(file.path).exists()
        hint = "check free space and permissions, then run the same command again"
        raise SkyrunError(f"cannot write {file.path}: {error}", hint + " to go on" * kept, FAILED) from error


def _encode(
    todo: Sequence[PlannedTensor],
    stamps: Mapping[Path, Stamp],
    partial: PartialFile,
    device: str,
    workers: int | None,
) -> Iterator[int]:
    at = {tensor.source: tensor for tensor in todo}
    every = [
        piece
        for tensor in todo
        for piece in pieces(tensor.source, tensor.type, tensor.importance, partial.path, tensor.offset, device)
    ]
    left = Counter(piece.source for piece in every)
    with Workers(sum(tensor.source.numel for tensor in todo), device, workers) as pool:
        for piece in pool.encode(every):
            tensor = at[piece.source]
            left[piece.source] -= 1
            if not left[piece.source]:
                _check_unchanged(tensor.source, stamps)
                partial.finished(tensor)
            yield tensor.nbytes * (piece.stop - piece.start) // piece.source.rows


def _check_unchanged(source: SourceTensor, stamps: Mapping[Path, Stamp]) -> None:
    for file in {source.file, *(part.up.file for part in source.added)}:
        if stamp(file) != stamps[file]:
            hint = "convert again once nothing writes to it"
            raise SkyrunError(f"{file} changed while {source.name} was read from it", hint)


def check_device(device: str) -> None:
    """Raise SkyrunError if encoders cannot run on the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SkyrunError(f"cannot encode on {device!r}: {reason}", "see skyrun doctor, or use cpu") from error


def convert(
    source: Path | str,
    out: Path | str,
    quant: str = "Q8_0",
    text_encoder_quant: str | None = None,
    device: str = "cpu",
    *,
    type_rules: Sequence[str] = (),
    target_size: str | int | None = None,
    imatrix: Path | str | None = None,
    loras: Sequence[tuple[Path | str, float]] = (),
) -> Mapping[str, Any]:
    """Convert a checkpoint. If a conversion was interrupted, calling it again continues it.

    Args:
        source: the checkpoint, a folder or a file.
        out: the folder for the converted files.
        quant: recipe of the transformer.
        text_encoder_quant: recipe of the text encoder; by default that of the transformer, but not below Q8_0.
        device: where encoders run.
        type_rules: "regex=TYPE" each; they take precedence over the recipe.
        target_size: of the transformer's file, such as "9GB", instead of a recipe.
        imatrix: a file of importances.
        loras: adapters that are merged into the transformer, with their strengths.

    Returns a summary with the path, role, bytes, types and fallbacks of each file. Raises SkyrunError for a checkpoint
    that is incomplete, misshapen or damaged; existing files in `out` are then unchanged.
    """
    size = parse_size(target_size) if isinstance(target_size, str) else target_size
    adapters = tuple((Path(path), strength) for path, strength in loras)
    settings = Settings(
        quant, text_encoder_quant, tuple(type_rules), size, Path(imatrix) if imatrix else None, adapters
    )
    check_device(device)
    conversion = plan_conversion(Path(source), Path(out), settings)
    check_space(conversion)
    for file in conversion.files:
        for _ in write_file(file, device):
            pass
    return conversion.summary()
