"""Read the header of a GGUF file from its first bytes, as far as they go.

The first bytes of a file on a hub decide whether the rest is downloaded. Other readers refuse files that are cut; this
one stops where the bytes end. No length in them is trusted.
"""

import struct
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any

from skyrun.kernels.formats import BY_ID

HEAD_BYTES = 1 << 16  # with everything that decides; a vocabulary comes after it
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MAX_DIMS = 8


@dataclass
class Head:
    """What the first bytes of a file contain.

    values: scalars and texts of the metadata. arrays: keys of its arrays. shapes: of tensors, rows before columns.
    types: of tensors, as GGUF's type ids.
    """

    values: dict[str, Any] = field(default_factory=dict)
    arrays: set[str] = field(default_factory=set)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)

    def text(self, key: str) -> str:
        """A text of the metadata; "" if there is none."""
        value = self.values.get(key)
        return value if isinstance(value, str) else ""

    @property
    def main_type(self) -> str:
        """The type of most weights in matrices; "" if no tensor is listed."""
        weights: Counter[str] = Counter()
        for name, shape in self.shapes.items():
            if len(shape) == 2 and self.types[name] in BY_ID:
                weights[BY_ID[self.types[name]].name] += prod(shape)
        return weights.most_common(1)[0][0] if weights else ""

    @property
    def unknown_type(self) -> int | None:
        """The id of a type that skyrun does not read; None if there is none."""
        return next((kind for kind in self.types.values() if kind not in BY_ID), None)


def read_head(data: bytes) -> Head:
    """Read the first bytes of a file. The result is empty if it is not a GGUF file."""
    head = Head()
    if data[:4] == b"GGUF":
        with suppress(_End):
            _Cursor(data, 4).read(head)
    return head


class _End(Exception):
    """The bytes end here, or are not valid from here on."""


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
        else:  # nested arrays, which no model has
            raise _End
