"""Find where the tensors of a `.pth` file lie, without torch and without running any code from the file.

The pickle in the file is read by Python's unpickler, which is restricted to a few names; these create records of shapes
and offsets instead of tensors. The opcodes are checked first, and every offset is checked against the zip file's
directory.
"""

import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.file_kind import kind_of
from skyrun.kernels.files.names import brief
from skyrun.quant.sources.source import SourceTensor

# torch's dtypes -> the names that are used here, and bytes per value. int8 keeps torch's name, which cannot be read: it
# needs scales, and no program writes scales to such files.
_DTYPES = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    **{name: (name, 1) for name in ("int8", "uint8", "bool")},
    **{name: (name, 2) for name in ("int16", "uint16")},
    **{name: (name, 4) for name in ("int32", "uint32")},
    **{name: (name, 8) for name in ("int64", "uint64", "float64")},
}
_STORAGES = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Char": "int8", "Byte": "uint8"}
_STORAGES |= {
    "Bool": "bool",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Double": "float64",
    "Untyped": "uint8",
}
# Keys that trainers wrap around a state dict. Averaged weights come first: they are the ones to use.
_WRAPPERS = (
    *("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "generator_ema", "params_ema"),
    *("state_dict", "model", "module", "model_state", "model_state_dict", "generator", "params", "net", "network"),
    *("dit", "weights"),
)
_MOST_WRAPPERS = 4  # nested ones that are searched; a dictionary may contain itself
_MOST_AXES, _LARGEST = 16, 1 << 48
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_MOST_OBJECTS = 8 << 20  # bytes of the pickle, which has names and shapes but no weights


# Tuples, because a pickle can change the objects that it creates, and tuples cannot be changed.
class _Storage(NamedTuple):
    """Where the values of tensors lie. dtype: torch's name."""

    dtype: str
    offset: int
    nbytes: int


class _Stored(NamedTuple):
    """A tensor of the pickle. skipped: values before it in the storage. layout: torch's name if it is not dense."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: _Storage | None
    skipped: int = 0
    layout: str = ""


class _Refused(Exception):
    """The pickle uses a name that does not belong in a state dict."""


def read_torch_file(path: Path) -> dict[str, SourceTensor]:
    """The tensors of a state dict. SkyrunError if it is damaged, older than torch 1.6, or holds more than tensors."""
    objects, storages = _open(path)
    try:
        _check_opcodes(objects)
        loaded = _Unpickler(objects, storages).load()
    except _Refused as error:
        raise SkyrunError(
            f"{path} holds more than tensors, and skyrun runs no code from files: it wants {error}",
            "get the model as .safetensors, or save only its state_dict()",
        ) from error
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise SkyrunError(f"{path} is damaged: {error}", "download it again") from error
    return _located(path, _state_dict(path, loaded))


def _check_opcodes(objects: bytes) -> None:
    """Raise ValueError for a memo index that is larger than the number of opcodes: it would allocate memory."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(objects), 1):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (not isinstance(argument, int) or argument > count):
            raise ValueError(f"object number {argument} after {count} opcodes")


class _Unpickler(pickle.Unpickler):
    """Knows tensors, their dtypes and dictionaries only. No object that it creates is larger than its pickle."""

    def __init__(self, objects: bytes, storages: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(BytesIO(objects), encoding="utf-8")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in _REBUILDERS:
            return _REBUILDERS[module, name]
        if module in ("torch", "torch.storage") and (storage := _STORAGES.get(name.removesuffix("Storage"))):
            return storage
        if module == "torch" and name in _DTYPES:
            return name
        raise _Refused(f"{module}.{name}"[:80])

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, _ = pid
        offset, nbytes = self._storages[key]
        return _Storage(dtype, offset, nbytes)


def _tensor(storage: _Storage, skipped: int, shape: Any, strides: Any, *more: Any) -> _Stored:
    """Replaces torch's _rebuild_tensor_v2 and _v3; the latter has a dtype as its last argument."""
    dtype = more[2] if len(more) > 2 and isinstance(more[2], str) else storage.dtype
    sides, steps = tuple(map(int, shape)), tuple(map(int, strides))
    known = isinstance(storage, _Storage) and dtype in _DTYPES and len(sides) == len(steps) <= _MOST_AXES
    if not known or not all(0 <= number < _LARGEST for number in (*sides, *steps, skipped)):
        raise ValueError("a tensor of an unknown type, shape or place")
    return _Stored(dtype, sides, steps, storage, int(skipped))


def _sparse(layout: str, *_: Any) -> _Stored:
    return _Stored("float32", (), (), None, layout=str(layout)[:40])


_REBUILDERS = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    ("torch.serialization", "_get_layout"): lambda name: str(name),
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *_: None,
}


def _state_dict(path: Path, loaded: Any) -> dict[str, _Stored]:
    """The tensors by name, without the dictionaries that trainers wrap around them."""
    if tensors := _unwrapped(loaded, _MOST_WRAPPERS):
        return tensors
    raise SkyrunError(f"{path} holds no tensors by name", "expected a state_dict saved by torch.save")


def _unwrapped(loaded: Any, depth: int) -> dict[str, _Stored]:
    if not isinstance(loaded, Mapping) or not depth:
        return {}
    inside = (_unwrapped(loaded[key], depth - 1) for key in _WRAPPERS if key in loaded)
    own = {str(name): value for name, value in loaded.items() if isinstance(value, _Stored)}
    return next((tensors for tensors in inside if tensors), own)


def _located(path: Path, tensors: dict[str, _Stored]) -> dict[str, SourceTensor]:
    found, problems = {}, []
    for name, tensor in tensors.items():
        dtype, width = _DTYPES[tensor.dtype]
        if tensor.storage is None:
            problems.append(f"{name} in {path.name} is {tensor.layout}, expected a dense tensor")
            continue
        needed = width * (tensor.skipped + prod(tensor.shape))
        if not _contiguous(tensor):
            problems.append(f"{name} in {path.name} is stored with strides {list(tensor.strides)}, not row after row")
        elif needed > tensor.storage.nbytes:
            problems.append(f"{name} in {path.name} takes {needed} bytes, its storage has {tensor.storage.nbytes}")
        else:
            offset = tensor.storage.offset + width * tensor.skipped
            found[name] = SourceTensor(name, tensor.shape, dtype, path, offset)
    if problems:
        hint = "save it again with contiguous tensors, or download the published one"
        raise SkyrunError.listing(f"cannot use {path}", brief(problems, "cannot be read"), hint)
    return found


def _contiguous(tensor: _Stored) -> bool:
    """Whether values follow each other in the order of the axes; true for an empty tensor."""
    step = 1
    for side, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if side != 1 and stride != step:
            return not prod(tensor.shape)
        step *= side
    return True


def _open(path: Path) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The pickle, and the (offset, bytes) of each storage by its key.

    Raises SkyrunError for anything but a zip file of torch.save.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                kind = kind_of(path)
                what = kind.what if kind else "it was not saved by torch 1.6 or newer, or is something else"
                hint = kind.hint if kind else "get the model as .safetensors, or save it again with a newer torch"
                raise SkyrunError(f"{path} is not a zip file: {what}", hint)
            with zipfile.ZipFile(file) as archive:
                places = _places(path, file, archive)
                pickles = [name for name in places if name.endswith("data.pkl")]
                if len(pickles) != 1:
                    raise SkyrunError(f"{path} is not a file of torch.save", "expected weights saved by torch.save")
                (name,) = pickles
                start, nbytes = places[name]
                if nbytes > _MOST_OBJECTS:
                    raise SkyrunError(f"{path} has {nbytes} bytes of objects", "expected weights and names")
            root = name.removesuffix("data.pkl")
            if (order := places.get(f"{root}byteorder")) and _read(file, order) != b"little":
                raise SkyrunError(f"{path} was saved by a big-endian machine", "get the model as .safetensors")
            data = f"{root}data/"
            storages = {key.removeprefix(data): place for key, place in places.items() if key.startswith(data)}
            return _read(file, (start, nbytes)), storages
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        raise SkyrunError(f"{path} is damaged: {error}", "download it again") from error
    except OSError as error:
        raise SkyrunError(f"cannot read {path}: {error}", "check the path and its permissions") from error


def _read(file: BinaryIO, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _places(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """The (offset, bytes) of the contents of each file in an archive."""
    infos = archive.infolist()
    if packed := [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]:
        raise SkyrunError(f"{path} is compressed ({packed[0]}), which torch never does", "get it from its publisher")
    places = {}
    for info in infos:
        file.seek(info.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or start + info.file_size > archive.start_dir:
            raise ValueError(f"{info.filename[:80]} does not lie in it")
        places[info.filename] = start, info.file_size
    return places
