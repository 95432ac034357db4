"""Importance of input channels ("imatrix"): how large the activations are that each column of a weight multiplies.

Two formats are read and written, which are told apart by content: GGUF, as llama.cpp's tools/imatrix writes it today
(tensors `NAME.in_sum2` and `NAME.counts`), and the older .dat of llama.cpp and stable-diffusion.cpp (means times
calls).
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGUFWriter
from torch import Tensor

from skyrun.kernels.errors import FAILED, MODEL_MISSING, SkyrunError
from skyrun.kernels.files.atomic import replacing
from skyrun.kernels.files.gguf_file import GGUFFile, TensorInfo, open_gguf
from skyrun.kernels.name_tables import TRANSFORMERS

_SUMS, _COUNTS = ".in_sum2", ".counts"
_CHUNKS, _ORIGIN, _SAMPLES = "imatrix.chunk_count", "skyrun.calibration.origin", "skyrun.calibration.samples"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
_MAX_NAME = 1 << 10
_MAX_INT32, _MAX_UINT32 = (1 << 31) - 1, (1 << 32) - 1


@dataclass(frozen=True)
class Importance:
    """Second moments of the inputs of weights, by original Wan name ("blocks.0.ffn.0.weight").

    sums: float64 [cols], the sum of squares of each input channel over all rows. counts: how many rows; files of the
    older format count calls instead. origin: the model and the settings that it was collected with, if known. samples:
    the clips that it was collected from, if known. chunks: how many clips, whether they are known or not.
    """

    sums: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    origin: str = ""
    samples: tuple[str, ...] = ()
    chunks: int = 0

    def mean(self, name: str) -> Tensor | None:
        """The mean square of each input channel of a weight, float32 [cols]; None if the weight is not included."""
        return (self.sums[name] / self.counts[name]).float() if name in self.sums else None

    def merge(self, other: "Importance") -> "Importance":
        """Add both, as if they were collected together. Raises SkyrunError if a width differs or a clip is in both."""
        problems = [
            f"{name} has {len(self.sums[name])} input channels in one and {len(other.sums[name])} in the other"
            for name in sorted(self.sums.keys() & other.sums.keys())
            if self.sums[name].shape != other.sums[name].shape
        ]
        if common := [sample for sample in self.samples if sample in other.samples]:
            problems.append(f"{len(common)} clips are in both, such as {common[0]!r}")
        if problems:
            raise SkyrunError.listing("these cannot be merged", problems, "merge files of one model, each once")
        sums, counts = dict(self.sums), dict(self.counts)
        for name, added in other.sums.items():
            sums[name] = sums[name] + added if name in sums else added
            counts[name] = counts.get(name, 0) + other.counts[name]
        origins = {part.origin for part in (self, other) if part.sums}
        origin = origins.pop() if len(origins) == 1 else ""
        return Importance(sums, counts, origin, self.samples + other.samples, self.chunks + other.chunks)


def original_name(name: str) -> str:
    """A weight's original Wan name, whichever prefix and naming the file uses."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for table in TRANSFORMERS:
        for naming in range(len(table.namings)):
            if place := table.locate(name, naming):
                row, index = place
                return row.name() if index is None else row.for_block(index).name()
    return name


class _Malformed(Exception):
    """What is wrong with a file; its path is added later."""


def read_importance(path: Path) -> Importance:
    """Read a file of either format. Weights with a count of 0 are left out.

    Raises SkyrunError if the file is missing, has neither format, is truncated, contradicts itself, or holds values
    that cannot be sums of squares.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                file.seek(0)
                return _checked(*_read_legacy(file, path.stat().st_size))
        return _checked(*_read_gguf(open_gguf(path)))
    except FileNotFoundError as error:
        raise SkyrunError(f"{path} does not exist", "check the path", MODEL_MISSING) from error
    except OSError as error:
        raise SkyrunError(f"cannot read {path}: {error}", "check the path and its permissions") from error
    except _Malformed as error:
        hint = "collect it again with `skyrun calibrate`, or use an imatrix of llama.cpp or stable-diffusion.cpp"
        raise SkyrunError(f"{path} is not a usable importance file: {error}", hint) from error


_Entries = list[tuple[str, Tensor, float]]  # name, sums, count


def _checked(entries: _Entries, origin: str, samples: tuple[str, ...], chunks: int) -> Importance:
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for stored, values, count in entries:
        name = original_name(stored)
        if not 0 <= count < 1 << 63:  # NaN too
            raise _Malformed(f"{stored} has a count of {count:g}")
        if not (torch.isfinite(values) & (values >= 0)).all():
            raise _Malformed(f"{stored} has sums of squares that are negative, infinite or NaN")
        if name in sums:
            raise _Malformed(f"{name} is in it twice")
        if round(count):
            sums[name], counts[name] = values.double(), round(count)
        elif values.any():
            raise _Malformed(f"{stored} has sums but a count of 0")
    if not sums:
        raise _Malformed(f"of its {len(entries)} weights no row was seen")
    return Importance(sums, counts, origin, samples, chunks)


def _read_gguf(file: GGUFFile) -> tuple[_Entries, str, tuple[str, ...], int]:
    stored = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    if not stored:
        raise _Malformed(f"none of its tensors is called NAME{_SUMS}")
    entries = []
    for name in stored:
        if (counts := file.tensors.get(name + _COUNTS)) is None:
            raise _Malformed(f"{name} has no {_COUNTS}")
        if prod(counts.shape) != 1:
            raise _Malformed(f"{name} has {prod(counts.shape)} counts, expected one: Wan has no experts")
        entries.append((name, _numbers(file, file.tensors[name + _SUMS]), float(_numbers(file, counts))))
    chunks = file.metadata.get(_CHUNKS, 0)
    if not isinstance(chunks, int) or not 0 <= chunks <= _MAX_UINT32:
        raise _Malformed(f"its {_CHUNKS} is {chunks!r}")
    return entries, str(file.metadata.get(_ORIGIN, "")), _texts(file.metadata.get(_SAMPLES, "[]")), chunks


def _numbers(file: GGUFFile, info: TensorInfo) -> Tensor:
    """Read a row of values, float32 [n]."""
    if info.format.name != "F32" or prod(info.shape) != info.shape[-1]:
        raise _Malformed(f"{info.name} is {info.format.name} {list(info.shape)}, expected one row of F32")
    return torch.frombuffer(file.read(info), dtype=torch.float32)


def _texts(value: Any) -> tuple[str, ...]:
    try:
        texts = json.loads(value)
        "".join(texts).encode()  # fails for half of a surrogate pair, which could not be written again
    except (TypeError, ValueError, RecursionError) as error:
        raise _Malformed(f"its {_SAMPLES} are not a list of texts") from error
    return tuple(texts)


def _read_legacy(file: BinaryIO, size: int) -> tuple[_Entries, str, tuple[str, ...], int]:
    """Read the older format.

    int32 number of entries; for each int32 length, name, int32 calls, int32 number of values, and the values: float32
    means times calls. Some writers add int32 chunks, int32 length and the name of the data set.
    """

    def take(count: int) -> bytes:
        if not 0 <= count <= size - file.tell():
            raise _Malformed(f"{count} bytes expected at {file.tell()}, the file has {size}")
        return file.read(count)

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    total = number()
    if not 1 <= total <= size // 12:
        raise _Malformed(f"it is not GGUF, and as the older format it would have {total} weights in {size} bytes")
    entries = []
    for _ in range(total):
        length = number()
        if not 1 <= length <= _MAX_NAME:
            raise _Malformed(f"a name of {length} bytes, expected 1 to {_MAX_NAME}")
        name = take(length).decode("utf-8", "replace")
        calls, values = number(), number()
        if values < 1:
            raise _Malformed(f"{name} has {values} input channels")
        entries.append((name, torch.frombuffer(bytearray(take(4 * values)), dtype=torch.float32), float(calls)))
    chunks = number() if size - file.tell() >= 4 else 0
    dataset = take(number()).decode("utf-8", "replace") if size - file.tell() >= 4 else ""
    return entries, dataset, (), max(chunks, 0)


def write_importance(path: Path, importance: Importance) -> None:
    """Write an importance as GGUF or in the older format, depending on the suffix: .gguf or .dat.

    An existing file is unchanged if that fails. Sums are rounded to float32. The older format does not store the list
    of clips, and limits counts to 2^31 - 1.
    """
    writers = {".gguf": _write_gguf, ".dat": _write_legacy}
    if path.suffix.lower() not in writers:
        raise SkyrunError(f"{path} ends in neither .gguf nor .dat", "name the file importance.gguf, for example")
    if not importance.sums:
        raise SkyrunError("an importance without any weight cannot be written", "collect it first")
    try:
        with replacing(path) as partial:
            writers[path.suffix.lower()](partial, importance)
    except OSError as error:
        raise SkyrunError(f"cannot write {path}: {error}", "check free space and permissions", FAILED) from error


def _write_gguf(path: Path, importance: Importance) -> None:
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    # llama.cpp accepts a file only if it has all three `imatrix.` keys.
    writer.add_array("imatrix.datasets", importance.samples or (importance.origin or "unknown",))
    rows = max(importance.counts.values()) // max(1, importance.chunks)
    writer.add_uint32(_CHUNKS, min(importance.chunks, _MAX_UINT32))
    writer.add_uint32("imatrix.chunk_size", min(rows, _MAX_UINT32))
    writer.add_string(_ORIGIN, importance.origin)
    writer.add_string(_SAMPLES, json.dumps(importance.samples))
    for name, sums in sorted(importance.sums.items()):
        writer.add_tensor(name + _SUMS, sums.float().numpy()[None])
        writer.add_tensor(name + _COUNTS, np.array([[importance.counts[name]]], np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _write_legacy(path: Path, importance: Importance) -> None:
    with open(path, "wb") as file:
        file.write(struct.pack("<i", len(importance.sums)))
        for name, sums in sorted(importance.sums.items()):
            stored, count = name.encode(), importance.counts[name]
            calls = min(count, _MAX_INT32)
            file.write(struct.pack("<i", len(stored)) + stored + struct.pack("<ii", calls, len(sums)))
            file.write((sums / count * calls).float().numpy().tobytes())
        origin = importance.origin.encode()
        file.write(struct.pack("<ii", min(importance.chunks, _MAX_INT32), len(origin)) + origin)
