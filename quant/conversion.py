"""Convert a checkpoint: plan every tensor of every file first, then write them one at a time."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, naming_convention, size_label
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from skyrun.kernels import block_format
from skyrun.kernels.atomic import replacing
from skyrun.kernels.errors import FAILED, SkyrunError
from skyrun.quant.encode import quantize
from skyrun.quant.families import Family, ModelTensor, find_families
from skyrun.quant.recipes import FILE_TYPES, check_quant, default_text_encoder_quant, tensor_type
from skyrun.quant.source import SourceTensor

_CHUNK_WEIGHTS = 1 << 22  # encoded at a time; bounds the memory of a conversion together with the encoder's temporaries


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of an output file: where it comes from and what it becomes."""

    name: str
    shape: tuple[int, ...]
    source: SourceTensor
    type: str
    nbytes: int
    fallback: str


@dataclass(frozen=True)
class PlannedFile:
    """An output file, decided to the byte before anything is read."""

    path: Path
    role: str
    architecture: str
    tensors: tuple[PlannedTensor, ...]
    metadata: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def summary(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "role": self.role,
            "bytes": self.nbytes,
            "tensors": len(self.tensors),
            "types": dict(Counter(tensor.type for tensor in self.tensors)),
            "fallbacks": {tensor.name: tensor.fallback for tensor in self.tensors if tensor.fallback},
        }


@dataclass(frozen=True)
class Conversion:
    """All files that a conversion writes."""

    source: Path
    files: tuple[PlannedFile, ...]

    @property
    def roles(self) -> set[str]:
        return {file.role for file in self.files}

    def summary(self) -> dict[str, Any]:
        return {"source": str(self.source), "files": [file.summary() for file in self.files]}


def plan_conversion(
    source: Path | str, out: Path | str, quant: str = "Q8_0", text_encoder_quant: str | None = None
) -> Conversion:
    """Decide every file, name and type. Reads headers only; raises SkyrunError for anything that will not convert."""
    quant = quant.upper()
    check_quant(quant)
    encoder_quant = text_encoder_quant.upper() if text_encoder_quant else default_text_encoder_quant(quant)
    check_quant(encoder_quant)
    quants = {"transformer": quant, "text_encoder": encoder_quant, "image_encoder": "F16"}
    found = find_families(Path(source))
    files = tuple(_plan_file(Path(out), family, quants.get(family.role, "")) for family in found.families)
    return Conversion(Path(source), files)


def _plan_file(out: Path, family: Family, quant: str) -> PlannedFile:
    tensors = tuple(_plan_tensor(family.role, tensor, quant) for tensor in family.tensors)
    label = size_label(sum(tensor.source.numel for tensor in tensors), 0, 0, 0)
    name = naming_convention(None, family.basename, None, None, label, quant or None)
    metadata = dict(family.metadata)
    if family.architecture:
        metadata |= {
            "general.name": f"{family.basename} {label}",
            "general.basename": family.basename,
            "general.size_label": label,
            "general.file_type": int(FILE_TYPES[quant]),
            "general.quantization_version": 2,
            "general.quantized_by": "skyrun",
            "skyrun.quant": quant,
        }
    suffix = ".gguf" if family.architecture else ".safetensors"
    return PlannedFile(out / f"{name}{suffix}", family.role, family.architecture, tensors, metadata)


def _plan_tensor(role: str, tensor: ModelTensor, quant: str) -> PlannedTensor:
    choice = tensor_type(role, tensor.name, tensor.shape, tensor.source.dtype, quant)
    nbytes = tensor.source.numel // tensor.shape[-1] * block_format(choice.type).row_bytes(tensor.shape[-1])
    return PlannedTensor(tensor.name, tensor.shape, tensor.source, choice.type, nbytes, choice.fallback)


def write_file(file: PlannedFile, device: str = "cpu") -> Iterator[PlannedTensor]:
    """Write a planned file beside its place and rename it when it is whole. Yields every tensor that is done."""
    try:
        yield from (_write_gguf if file.architecture else _write_safetensors)(file, device)
    except (OSError, SafetensorError) as error:
        hint = "nothing was left half-written: check free space and permissions, then convert again"
        raise SkyrunError(f"cannot write {file.path}: {error}", hint, FAILED) from error


def check_space(conversion: Conversion) -> None:
    """SkyrunError if the folder or the disk cannot take the files. Writes nothing."""
    folder = conversion.files[0].path.absolute().parent
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise SkyrunError(f"cannot write to the folder {folder}", f"{existing} is not a folder that can be written to")
    needed, free = sum(file.nbytes for file in conversion.files), shutil.disk_usage(existing).free
    if needed > free:
        raise SkyrunError(
            f"the converted files need {needed / 1e6:.0f} MB and {existing} has {free / 1e6:.0f} MB free",
            "free some space, choose another folder with -o, or a smaller --quant",
            FAILED,
        )


class _Piecewise:
    """Stands in for an array in gguf's writer, which asks for its size and tells it to write itself."""

    def __init__(self, tensor: PlannedTensor, device: str) -> None:
        self.nbytes = tensor.nbytes
        self._tensor, self._device = tensor, device

    def tofile(self, out: IO[bytes]) -> None:
        for piece in _encoded(self._tensor, self._device):
            out.write(piece.cpu().numpy().data)


def _write_gguf(file: PlannedFile, device: str) -> Iterator[PlannedTensor]:
    with replacing(file.path) as partial:
        writer = GGUFWriter(partial, file.architecture)
        for key, value in file.metadata.items():
            _add_value(writer, key, value)
        for tensor in file.tensors:
            kind = GGMLQuantizationType[tensor.type]
            # float32 stands for "the shape is in weights": the real type is `raw_dtype`
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in file.tensors:
                writer.write_tensor_data(cast(Any, _Piecewise(tensor, device)))
                yield tensor
        finally:
            writer.close()


def _add_value(writer: GGUFWriter, key: str, value: str | int | float) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _encoded(tensor: PlannedTensor, device: str) -> Iterator[Tensor]:
    step = max(1, _CHUNK_WEIGHTS // tensor.source.cols)
    for start in range(0, tensor.source.rows, step):
        piece = tensor.source.read(start, min(start + step, tensor.source.rows))
        try:
            yield quantize(piece.to(device), tensor.type)
        except SkyrunError as error:
            where = f"{tensor.source.name} in {tensor.source.file}"
            raise SkyrunError(f"cannot encode {where} as {tensor.type}: {error.message}", error.hint) from error


def _write_safetensors(file: PlannedFile, device: str) -> Iterator[PlannedTensor]:
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    for tensor in file.tensors:
        pieces = [piece.flatten() for piece in _encoded(tensor, "cpu")]
        tensors[tensor.name] = torch.cat(pieces).view(plain[tensor.type]).view(tensor.shape)
        yield tensor
    with replacing(file.path) as partial:
        save_file(tensors, partial, file.metadata)


def convert(
    source: Path | str,
    out: Path | str,
    quant: str = "Q8_0",
    text_encoder_quant: str | None = None,
    device: str = "cpu",
) -> Mapping[str, Any]:
    """Convert the checkpoint folder `source` to files in the folder `out`.

    quant: type of the transformer's block matrices. text_encoder_quant: of the text encoder's, by default the same but
    not below Q8_0. device: where encoders run. Returns a summary: files with path, role, bytes, types and fallbacks.
    Raises SkyrunError for a checkpoint that is incomplete, misshapen or damaged; what was in `out` survives it.
    """
    conversion = plan_conversion(source, out, quant, text_encoder_quant)
    check_space(conversion)
    for file in conversion.files:
        for _ in write_file(file, device):
            pass
    return conversion.summary()
