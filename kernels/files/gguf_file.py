"""Read the header of a GGUF file: the metadata and each tensor's place. Every offset is checked before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. gguf-py's reader maps the file and builds a Python
list for every array; this one reads the header once, keeps only the places of arrays, and checks every length against
the file's size before it reads or allocates.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from skyrun.kernels.errors import MODEL_MISSING, SkyrunError
from skyrun.kernels.files.file_kind import kind_of
from skyrun.kernels.files.reading import open_unbuffered, read_into
from skyrun.kernels.formats import BY_ID, Format

_MAX_STRING = 1 << 28  # a tokenizer is tens of MB
_MAX_NAME = 1 << 10
_MAX_ENTRIES = 1 << 16  # tensors, or metadata keys
_MAX_DIMS = 8
_MAX_NESTING = 4
_STRING, _ARRAY = 8, 9
_WALK = 1 << 13  # bytes of an array of texts that are read at a time
# Types that other programs write and skyrun does not decode, by their number in GGUF.
_OTHER_TYPES = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S"}
_OTHER_TYPES |= {22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0"}
_OTHER_TYPES |= {35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file. shape: in torch's order, rows before columns. offset: bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ArrayInfo:
    """Where an array of the metadata lies; its items are not read. kind: GGUF's number for the type of the items."""

    kind: int
    count: int
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class GGUFFile:
    """The header of a GGUF file. metadata: its scalars and strings. arrays: where its arrays lie."""

    path: Path
    metadata: dict[str, Any]
    arrays: dict[str, ArrayInfo]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def part(self) -> tuple[int, int]:
        """(number, count) of a file that is one of several parts of a model; (1, 1) if the model was not split."""
        number, count = self.metadata.get("split.no"), self.metadata.get("split.count")
        if isinstance(number, int) and isinstance(count, int) and 0 <= number < count:
            return number + 1, count
        return 1, 1

    def number(self, key: str, default: float) -> float:
        """A number in the metadata. Raises SkyrunError if the value is something else."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SkyrunError(f"{self.path} says {key} = {value!r}, expected a number", "convert or download it again")
        return value

    def read(self, info: TensorInfo, start: int = 0, nbytes: int | None = None) -> bytearray:
        """Read `nbytes` bytes of a tensor, beginning at its byte `start`; by default the whole tensor."""
        data = bytearray(info.nbytes - start if nbytes is None else nbytes)
        with open_unbuffered(self.path) as file:
            read_into(file, memoryview(data), info.offset + start)
        return data

    def array(self, key: str) -> list[Any]:
        """Read an array of numbers or texts; [] if there is none. Raises SkyrunError if it is nested or not UTF-8."""
        info = self.arrays.get(key, ArrayInfo(0, 0, 0, 0))
        data = bytearray(info.nbytes)
        with open_unbuffered(self.path) as file:
            read_into(file, memoryview(data), info.offset)
        try:
            if info.kind != _STRING:
                return list(struct.unpack(f"<{info.count}{_SCALARS[info.kind][1]}", data))
            texts, at = [], 0
            for _ in range(info.count):
                end = at + 8 + struct.unpack_from("<Q", data, at)[0]
                texts.append(data[at + 8 : end].decode("utf-8"))
                at = end
            return texts
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            hint = "convert the published checkpoint, or take the file from another source"
            raise SkyrunError(f"{self.path} has a {key} that cannot be read: {error}", hint) from error


def open_gguf(path: Path) -> GGUFFile:
    """Read and check a header. Raises SkyrunError if the file is missing, not GGUF, truncated, or inconsistent."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            return _Header(file, size).parse(path)
    except FileNotFoundError as error:
        raise SkyrunError(f"{path} does not exist", "check the path", MODEL_MISSING) from error
    except OSError as error:
        raise SkyrunError(f"cannot read {path}: {error}", "check the path and its permissions") from error
    except _Malformed as error:
        raise SkyrunError(f"{path} is not a usable GGUF file: {error}", error.hint) from error


class _Malformed(Exception):
    """What is wrong with a header; the path is added later."""

    def __init__(self, message: str, hint: str = "it is damaged: take it from another source, or convert it") -> None:
        super().__init__(message)
        self.hint = hint


class _Cut(_Malformed):
    """The file is shorter than its header says."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "it is cut: download or convert it again")


class _Header:
    """A cursor over the header that knows how much of the file is left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._at = file, size, 0
        self._arrays: dict[str, ArrayInfo] = {}

    def parse(self, path: Path) -> GGUFFile:
        magic = self._take(4)
        if magic != b"GGUF":
            kind = kind_of(path)
            message = f"it starts with {magic!r}, expected b'GGUF'"
            raise _Malformed(f"{message}: {kind.what}", kind.hint) if kind else _Malformed(message)
        version = self._scalar("<I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            message = "it is big-endian" if swapped in (2, 3) else f"version {version}, expected 2 or 3"
            raise _Malformed(message, "get it as little-endian GGUF of version 3")
        tensor_count = self._count(24, _MAX_ENTRIES)
        metadata = self._metadata(self._count(12, _MAX_ENTRIES))
        tensors: dict[str, TensorInfo] = {}
        for _ in range(tensor_count):
            info = self._tensor()
            if info.name in tensors:
                raise _Malformed(f"two tensors are called {info.name!r}")
            tensors[info.name] = info
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise _Malformed(f"alignment {alignment!r}, expected a power of two from 8")
        data = -(-self._at // alignment) * alignment
        return GGUFFile(path, metadata, self._arrays, self._placed(tensors, data, alignment))

    def _placed(self, tensors: dict[str, TensorInfo], data: int, alignment: int) -> dict[str, TensorInfo]:
        placed: dict[str, TensorInfo] = {}
        for info in tensors.values():
            if info.offset % alignment:
                raise _Malformed(f"{info.name} starts at {info.offset}, expected a multiple of {alignment}")
            end = data + info.offset + info.nbytes
            if end > self._size:
                raise _Cut(f"{info.name} ends at byte {end}, the file at {self._size}")
            placed[info.name] = TensorInfo(info.name, info.shape, info.format, data + info.offset, info.nbytes)
        last = 0
        for info in sorted(placed.values(), key=lambda info: info.offset):
            if info.offset < last:
                raise _Malformed(f"{info.name} overlaps the tensor before it")
            last = info.offset + info.nbytes
        return placed

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise _Cut(f"{count} bytes expected at {self._at}, the file has {self._size}")
        self._at += count
        taken = self._file.read(count)
        if len(taken) != count:
            raise _Cut("it was cut while it was read")
        return taken

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise _Cut(f"an array of {count} bytes at {self._at}, the file has {self._size}")
        self._at += count
        self._file.seek(self._at)

    def _scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _count(self, smallest: int, most: int | None = None) -> int:
        """Read a count of items. Checks that it is at most `most` and that the rest of the file can hold that many.

        smallest: the least bytes that an item takes.
        """
        count = int(self._scalar("<Q"))
        if most is not None and count > most:
            raise _Malformed(f"{count} entries cannot fit a header, expected at most {most}")
        if count * smallest > self._size - self._at:
            raise _Cut(f"{count} entries cannot fit in {self._size - self._at} bytes")
        return count

    def _string(self, limit: int) -> str:
        length = int(self._scalar("<Q"))
        if length > limit:
            raise _Malformed(f"a text of {length} bytes, expected at most {limit}")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Malformed("a text that is not UTF-8") from error

    def _metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self._string(_MAX_NAME)
            kind = self._scalar("<I")
            if kind == _ARRAY:
                self._arrays[key] = self._skip_array(0)
            elif kind == _STRING:
                values[key] = self._string(_MAX_STRING)
            else:
                values[key] = self._scalar(self._layout(kind))
        return values

    def _layout(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise _Malformed(f"a value of kind {kind}, expected 0 to 12")
        return _SCALARS[kind]

    def _skip_array(self, depth: int) -> ArrayInfo:
        if depth > _MAX_NESTING:
            raise _Malformed("arrays nested too deep")
        kind = self._scalar("<I")
        width = {_ARRAY: 12, _STRING: 8}.get(kind) or struct.calcsize(self._layout(kind))
        count = self._count(width)
        start = self._at
        if kind == _ARRAY:
            for _ in range(count):
                self._skip_array(depth + 1)
        elif kind == _STRING:
            self._skip_texts(count)
        else:
            self._skip(count * width)
        return ArrayInfo(kind, count, start, self._at - start)

    def _skip_texts(self, count: int) -> None:
        """Skip texts by their lengths, in large reads: a vocabulary has a quarter of a million texts."""
        while count:
            self._file.seek(self._at)
            window = self._file.read(min(_WALK, self._size - self._at))
            at = 0
            while count and at + 8 <= len(window):
                at += 8 + int.from_bytes(window[at : at + 8], "little")
                count -= 1
            if not at:
                raise _Cut(f"a text expected at {self._at}, the file has {self._size} bytes")
            self._skip(at)

    def _tensor(self) -> TensorInfo:
        """Read a tensor's entry. Its offset still counts from the start of the data section."""
        name = self._string(_MAX_NAME)
        dims = self._scalar("<I")
        if not 1 <= dims <= _MAX_DIMS:
            raise _Malformed(f"{name} has {dims} dimensions, expected 1 to {_MAX_DIMS}")
        shape = tuple(self._scalar("<Q") for _ in range(dims))[::-1]
        kind, offset = self._scalar("<I"), self._scalar("<Q")
        if kind not in BY_ID:
            known = ", ".join(format.name for format in BY_ID.values())
            type = f"type number {kind}" + (f", {_OTHER_TYPES[kind]}" if kind in _OTHER_TYPES else "")
            hint = "take a file of the same model in one of these types, or convert the published checkpoint"
            raise _Malformed(f"{name} has {type}; skyrun reads {known}", hint)
        format = BY_ID[kind]
        if not all(shape) or shape[-1] % format.block_size:
            raise _Malformed(f"{name} has shape {list(shape)}, expected rows of whole {format.name} blocks")
        nbytes = prod(shape) // format.block_size * format.block_bytes
        if nbytes > self._size:
            raise _Cut(f"{name} would take {nbytes} bytes, the file has {self._size}")
        return TensorInfo(name, shape, format, offset, nbytes)
