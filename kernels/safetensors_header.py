"""Read the header of a safetensors file, without torch and without trusting it."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from skyrun.kernels.errors import MODEL_MISSING, SkyrunError

_MAX_HEADER = 100 << 20  # the limit of the format
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
    """Tensors by name, and the texts that the writer left."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_safetensors_header(path: Path, nbytes: int | None = None) -> SafetensorsHeader:
    """SkyrunError if the file is missing, none of the format, shorter than its header says, or contradicts itself.

    nbytes: that the file will have, where only its beginning is there yet.
    """
    try:
        size = path.stat().st_size if nbytes is None else nbytes
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        data_bytes = size - 8 - length
        tensors = {name: _checked(name, entry, 8 + length, data_bytes) for name, entry in header.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) != data_bytes:
            raise ValueError(f"its tensors do not cover the {data_bytes} bytes of data")
        return SafetensorsHeader(tensors, metadata)
    except FileNotFoundError as error:
        raise SkyrunError(f"{path} does not exist", "check the path", MODEL_MISSING) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SkyrunError(
            f"{path} is not a usable safetensors file: {error}", "convert or download it again"
        ) from error


def _checked(name: str, entry: dict[str, Any], data: int, data_bytes: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    if not all(isinstance(side, int) and side >= 0 for side in (*shape, start, end)):
        raise ValueError(f"{name} has shape {list(shape)} from {start} to {end}")
    if not start <= end <= data_bytes:
        raise ValueError(f"{name} ends at byte {end}, the data at {data_bytes}")
    if dtype in _WIDTHS and prod(shape) * _WIDTHS[dtype] != end - start:
        raise ValueError(f"{name} has shape {list(shape)} in {end - start} bytes of {dtype}")
    return StoredTensor(dtype, shape, data + start, end - start)
