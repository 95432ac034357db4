"""The first bytes of a GGUF file: what they say of it, as far as they go.

A reader of whole files refuses what is cut; of a file on a hub there is only the beginning, and that decides whether
the rest is fetched. Lengths are not trusted: reading ends where the bytes do.
"""

import struct
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any

from skyrun.kernels.formats import BY_ID

HEAD_BYTES = 1 << 16  # in which everything stands that decides; a vocabulary comes after it
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MAX_DIMS = 8


@dataclass
class Head:
    """What a file's first bytes say of it.

    values: scalars and texts of the metadata. arrays: names of its arrays. shapes: of tensors, rows before columns;
    types: GGUF's numbers of theirs.
    """

    values: dict[str, Any] = field(default_factory=dict)
    arrays: set[str] = field(default_factory=set)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)

    def text(self, key: str) -> str:
        """A text of the metadata, "" where there is none."""
        value = self.values.get(key)
        return value if isinstance(value, str) else ""

    @property
    def main_type(self) -> str:
        """The type that most weights of matrices have, "" where no tensor is in sight."""
        weights: Counter[str] = Counter()
        for name, shape in self.shapes.items():
            if len(shape) == 2 and self.types[name] in BY_ID:
                weights[BY_ID[self.types[name]].name] += prod(shape)
        return weights.most_common(1)[0][0] if weights else ""

    @property
    def unknown_type(self) -> int | None:
        """The number of a type that is not read here."""
        return next((kind for kind in self.types.values() if kind not in BY_ID), None)


def read_head(data: bytes) -> Head:
    """What a file's first bytes say; of one that is no GGUF file nothing."""
    head = Head()
    if data[:4] == b"GGUF":
        with suppress(_End):
            _Cursor(data, 4).read(head)
    return head


class _End(Exception):
    """The bytes end here, or make no sense from here on."""


class _Cursor:
    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at

    def read(self, head: Head) -> None:
        version, tensors, entries = self._number("<I"), self._number("<Q"), self._number("<Q")
        if version not in (2, 3):
            return
        for _ in range(entries):
            key, kind = self._text(), self._number("<I")
            if kind == _ARRAY:
                head.arrays.add(key)
                self._skip_array()
            else:
                head.values[key] = self._text() if kind == _STRING else self._scalar(kind)
        for _ in range(tensors):
            name, dims = self._text(), self._number("<I")
            if dims > _MAX_DIMS:
                return
            shape = tuple(self._number("<Q") for _ in range(dims))[::-1]
            head.types[name] = self._number("<I")
            head.shapes[name] = shape
            self._number("<Q")

    def _bytes(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise _End
        return self._data[start : self._at]

    def _number(self, layout: str) -> int:
        return int(self._value(layout))

    def _scalar(self, kind: int) -> Any:
        if kind not in _SCALARS:
            raise _End
        return self._value(_SCALARS[kind])

    def _value(self, layout: str) -> Any:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]

    def _text(self) -> str:
        try:
            return self._bytes(self._number("<Q")).decode()
        except UnicodeDecodeError as error:
            raise _End from error

    def _skip_array(self) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _STRING:
            for _ in range(count):
                self._bytes(self._number("<Q"))
        elif kind in _SCALARS:
            self._bytes(count * struct.calcsize(_SCALARS[kind]))
        else:  # arrays of arrays, which no model has
            raise _End
