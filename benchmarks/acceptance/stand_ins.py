"""Stand-ins for packages of skyrun that a lent machine may lack, where nothing can be installed.

av fails where it is used. ftfy hands plain English on. gguf has the writer as far as skyrun uses it: a header of
format version 3 and tensors at multiples of 32 bytes (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import enum
import importlib
import importlib.abc
import importlib.machinery
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_ALIGNMENT, _VERSION = 32, 3
_UINT8, _UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 0, 4, 5, 6, 7, 8, 9


def install() -> None:
    """Put a stand-in in the place of every package that cannot be imported."""
    for name, make in (("av", _av), ("ftfy", _ftfy), ("gguf", gguf)):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            sys.modules[name] = make()


def need(*names: str) -> None:
    """Raise ModuleNotFoundError unless the packages are there, for work in which a stand-in does not do."""
    for name in names:
        if importlib.import_module(name).__spec__ is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class _Absent(ModuleType):
    """A module whose names can be imported, and fail where they are used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        owner = self.__name__.partition(".")[0]

        class Name(Exception, metaclass=_AbsentName):  # named in annotations and in `except`
            package = owner

        return Name


class _AbsentName(type):
    package: str

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise ModuleNotFoundError(f"No module named '{cls.package}'", name=cls.package)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


class _AbsentParts(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of an absent package."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.startswith("av."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _av() -> ModuleType:
    module = _Absent("av")
    module.__path__ = []
    sys.meta_path.insert(0, _AbsentParts())
    return module


def _ftfy() -> ModuleType:
    module = ModuleType("ftfy")

    def fix_text(text: str) -> str:
        if not text.isascii():
            raise ModuleNotFoundError("No module named 'ftfy'", name="ftfy")
        return text

    module.__dict__["fix_text"] = fix_text
    return module


def gguf() -> ModuleType:
    """The stand-in for gguf."""
    from skyrun.kernels.formats import FORMATS

    module = ModuleType("gguf")
    types = enum.IntEnum("GGMLQuantizationType", {name: format.id for name, format in FORMATS.items()})  # type: ignore[misc]
    module.__dict__.update(
        GGUFWriter=GGUFWriter, GGMLQuantizationType=types, naming_convention=_joined, size_label=_joined
    )
    return module


def _joined(*parts: Any, **_: Any) -> str:
    """A name of a file; which one, matters to nobody here."""
    return "-".join(str(part) for part in parts if part)


class GGUFWriter:
    """Writes a header, and then the tensors in its order."""

    def __init__(self, path: Path | str, architecture: str) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  until close()
        self._keys: list[bytes] = []
        self._tensors: list[tuple[str, Sequence[int], int, int]] = []
        self.add_string("general.architecture", architecture)

    def add_bool(self, key: str, value: bool) -> None:
        self._add(key, _BOOL, struct.pack("<?", value))

    def add_uint32(self, key: str, value: int) -> None:
        self._add(key, _UINT32, struct.pack("<I", value))

    def add_float32(self, key: str, value: float) -> None:
        self._add(key, _FLOAT32, struct.pack("<f", value))

    def add_string(self, key: str, value: str) -> None:
        self._add(key, _STRING, _text(value))

    def add_array(self, key: str, value: Sequence[Any]) -> None:
        if not value:
            return
        kinds = {str: (_STRING, None), int: (_INT32, "i"), float: (_FLOAT32, "f")}
        kind, code = (_UINT8, "B") if isinstance(value, bytes) else kinds[type(value[0])]
        items = b"".join(map(_text, value)) if code is None else struct.pack(f"<{len(value)}{code}", *value)
        self._add(key, _ARRAY, struct.pack("<IQ", kind, len(value)) + items)

    def add_tensor_info(
        self, name: str, shape: Sequence[int], dtype: "np.dtype[Any]", nbytes: int, raw_dtype: int
    ) -> None:
        """shape: in bytes where dtype is uint8, in weights otherwise."""
        if dtype == np.uint8:
            from skyrun.kernels.formats import BY_ID

            format = BY_ID[int(raw_dtype)]
            shape = (*shape[:-1], shape[-1] // format.block_bytes * format.block_size)
        self._tensors.append((name, shape, int(raw_dtype), nbytes))

    def write_header_to_file(self) -> None:
        self._file.write(b"GGUF" + struct.pack("<IQQ", _VERSION, len(self._tensors), len(self._keys)))

    def write_kv_data_to_file(self) -> None:
        self._file.write(b"".join(self._keys))

    def write_ti_data_to_file(self) -> None:
        at = 0
        for name, shape, kind, nbytes in self._tensors:
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            self._file.write(_text(name) + dims + struct.pack("<IQ", kind, at))
            at += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._file.flush()

    def write_tensor_data(self, data: "np.ndarray[Any, Any]") -> None:
        self._pad()
        data.tofile(self._file)
        self._pad()

    def close(self) -> None:
        self._file.close()

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))

    def _add(self, key: str, kind: int, value: bytes) -> None:
        self._keys.append(_text(key) + struct.pack("<I", kind) + value)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data
