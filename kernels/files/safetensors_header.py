"""Read and check the header of a safetensors file, without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from skyrun.kernels.errors import MODEL_MISSING, SkyrunError
from skyrun.kernels.files.file_kind import kind_of

_MAX_HEADER = 100 << 20  # the limit of the format
_MAX_ITEMS = 1 << 21  # in the header's JSON, metadata included; a tensor has about eight
_MAX_DIMS = 16
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_WIDTHS |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file. offset: bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """A file's tensors by name, and the metadata that its writer left."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_safetensors_header(path: Path, nbytes: int | None = None) -> SafetensorsHeader:
    """Read and check the header.

    nbytes: the final size of a file of which only the beginning has been downloaded.

    Raises SkyrunError if the file is missing, not safetensors, shorter than its header says, or contradicts itself.
    """
    try:
        size = path.stat().st_size if nbytes is None else nbytes
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER:
                raise _AnotherKind(f"a header of {length} bytes in a file of {size}")
            if length > size - 8:
                raise _Cut(f"a header of {length} bytes in a file of {size}")
            header = _parse(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        data_bytes = size - 8 - length
        tensors = {name: _checked(name, entry, 8 + length) for name, entry in header.items()}
        _check_places(tensors, 8 + length, data_bytes)
        return SafetensorsHeader(tensors, metadata)
    except FileNotFoundError as error:
        raise SkyrunError(f"{path} does not exist", "check the path", MODEL_MISSING) from error
    except _Cut as error:
        raise SkyrunError(
            f"{path} is not a usable safetensors file: {error}", "it is cut: download it again"
        ) from error
    except (_AnotherKind, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        kind = kind_of(path) if isinstance(error, _AnotherKind) else None
        message = f"{path} is not a usable safetensors file: {kind.what if kind else error}"
        hint = kind.hint if kind else "it is damaged: take it from another source, or download the published one"
        raise SkyrunError(message, hint) from error


def own_words(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What skyrun wrote into a file's metadata; {} if nothing. ValueError if that is no JSON object."""
    try:
        said = json.loads(metadata.get("skyrun", "{}"))
    except RecursionError as error:
        raise ValueError("lists within lists without end") from error
    if not isinstance(said, dict):
        raise ValueError(f"its entry skyrun is of type {type(said).__name__}, expected an object")
    return said


class _AnotherKind(Exception):
    """The file does not begin with the length of a header."""


class _Cut(Exception):
    """The file is shorter than its header says."""


def _parse(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise ValueError(f"its header starts with {text[:8]!r}, expected an object")
    if sum(text.count(sign) for sign in (b",", b"[", b"{")) > _MAX_ITEMS:
        raise ValueError(f"a header of more than {_MAX_ITEMS} items")
    return json.loads(text)  # type: ignore[no-any-return]


def _check_places(tensors: dict[str, StoredTensor], start: int, data_bytes: int) -> None:
    """Raise ValueError unless the tensors follow each other without gaps, _Cut if the data ends before they do."""
    last, end = "", start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < end:
            raise ValueError(f"{name} overlaps {last}")
        if tensor.offset > end:
            raise ValueError(f"there is a gap of {tensor.offset - end} bytes before {name}")
        last, end = name, tensor.offset + tensor.nbytes
    if end > start + data_bytes:
        raise _Cut(f"{last} ends at byte {end - start}, the data at {data_bytes}")
    if end < start + data_bytes:
        raise ValueError(f"its tensors do not cover the {data_bytes} bytes of data")


def _checked(name: str, entry: dict[str, Any], data: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    if len(shape) > _MAX_DIMS:
        raise ValueError(f"{name} has {len(shape)} dimensions, expected at most {_MAX_DIMS}")
    if not all(isinstance(side, int) and side >= 0 for side in (*shape, start, end)) or end < start:
        raise ValueError(f"{name} has shape {list(shape)} from {start} to {end}")
    if dtype in _WIDTHS and prod(shape) * _WIDTHS[dtype] != end - start:
        raise ValueError(f"{name} has shape {list(shape)} in {end - start} bytes of {dtype}")
    return StoredTensor(dtype, shape, data + start, end - start)
