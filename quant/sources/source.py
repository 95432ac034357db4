"""A tensor in a file of any format: where it lies, and how its rows are read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skyrun.kernels import FORMATS, dequantize
from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.reading import open_unbuffered, read_into

PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}

READABLE = tuple(dict.fromkeys((*PLAIN, *FORMATS)))

_BLOCK_SIDES = (128, 64, 32, 16, 256, 512)  # rows or columns that a scale of a grid may be for, the usual number first

Stamp = tuple[int, int, int]


def stamp(file: Path) -> Stamp:
    """The inode, size and modification time of a file, to notice changes. Raises SkyrunError if the file is gone."""
    try:
        status = file.stat()
    except OSError as error:
        raise SkyrunError(f"cannot read {file}: {error}", "restore it and convert again") from error
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a file; it is read on demand.

    dtype: F32, F16, BF16, F8_E4M3, F8_E5M2, I8 or a GGUF type such as Q8_0. offset: of its first byte in the file.
    scale: what the stored values are multiplied by: a scalar, one value per row, or a grid [rows, cols] with one per
    block. parts: tensors of the same file whose rows are concatenated in this one. transposed: whether rows are columns
    in the file. added: what adapters add to it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    scale: "SourceTensor | None" = None
    parts: "tuple[SourceTensor, ...]" = ()
    transposed: bool = False
    added: "tuple[Added, ...]" = ()

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix; a vector and a scalar have one."""
        return self.numel // self.cols if self.cols else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the file."""
        if self.dtype in PLAIN:
            return self.cols * PLAIN[self.dtype].itemsize
        return FORMATS[self.dtype].row_bytes(self.cols)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows in the file."""
        return self.rows * self.row_bytes

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows `start` to `stop` as float32 [stop - start, cols]. SkyrunError if the file is gone or too short."""
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start} to {stop} of {self.name}, which has {self.rows}")
        if self.added:
            weights = replace(self, added=()).read(start, stop)
            for part in self.added:
                weights = weights + part.read(start, stop, self.cols)
            return weights
        if self.parts:
            pieces = [part.read(first, last) for part, first, last in self._split(start, stop)]
            return torch.cat(pieces, 1 if len(self.shape) == 1 else 0)
        if self.transposed:
            stored = replace(self, shape=self.shape[::-1], transposed=False).read()
            return stored.t()[start:stop].contiguous()
        data = self._bytes(start, stop).view(stop - start, self.row_bytes)
        weights = data.view(PLAIN[self.dtype]).float() if self.dtype in PLAIN else dequantize(data, self.dtype)
        if self.scale is None:
            return weights
        return weights.mul_(self._scales(self.scale, start, stop))

    def is_stored_as(self, type: str) -> bool:
        """Whether the rows are already stored in a GGUF type, byte for byte."""
        if self.added:
            return False
        if self.parts:
            return all(part.is_stored_as(type) for part in self.parts)
        return self.dtype == type and self.scale is None and not self.transposed

    def stored_rows(self, start: int, stop: int) -> memoryview:
        """The stored bytes of rows, for a tensor that is copied without encoding."""
        if self.parts:
            pieces = [part.stored_rows(first, last) for part, first, last in self._split(start, stop)]
            return memoryview(b"".join(pieces))
        return self._bytes(start, stop).numpy().data

    def _bytes(self, start: int, stop: int) -> Tensor:
        data = torch.empty((stop - start) * self.row_bytes, dtype=torch.uint8)
        with open_unbuffered(self.file) as file:
            read_into(file, data.numpy().data, self.offset + start * self.row_bytes)
        return data

    def _split(self, start: int, stop: int) -> "Iterator[tuple[SourceTensor, int, int]]":
        """(part, first, last) of the rows that make up rows `start` to `stop`. Vectors are concatenated to one row."""
        before = 0
        for part in self.parts:
            if len(self.shape) == 1:
                yield part, start, stop
                continue
            first, last = max(start - before, 0), min(stop - before, part.rows)
            if first < last:
                yield part, first, last
            before += part.rows

    def _scales(self, scale: "SourceTensor", start: int, stop: int) -> Tensor:
        """The scales of rows `start` to `stop`, [stop - start, 1 or cols]."""
        blocks = scale_blocks(self, scale)
        assert blocks, f"{scale.name} was checked"
        grid = scale.read().view(blocks.rows, blocks.cols)[torch.arange(start, stop) // blocks.height]
        return grid if blocks.cols == 1 else grid.repeat_interleave(blocks.width, 1)[:, : self.cols]

    def as_json(self) -> dict[str, Any]:
        """The tensor as plain values, so that another process can read it."""
        place = {"file": str(self.file), "offset": self.offset, "transposed": self.transposed}
        place |= {"scale": self.scale.as_json() if self.scale else None}
        place |= {"parts": [part.as_json() for part in self.parts], "added": [part.as_json() for part in self.added]}
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype} | place

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "SourceTensor":
        scale = cls.from_json(said["scale"]) if said["scale"] else None
        parts, added = tuple(map(cls.from_json, said["parts"])), tuple(map(Added.from_json, said["added"]))
        plain = {"file": Path(said["file"]), "shape": tuple(said["shape"])}
        return cls(**said | plain | {"scale": scale, "parts": parts, "added": added})


@dataclass(frozen=True)
class Added:
    """What an adapter adds to a tensor: scale * up @ down or, without a down, scale * up.

    up: a row for each row of the tensor. down: [rank, cols].
    """

    up: SourceTensor
    down: SourceTensor | None
    scale: float

    def read(self, start: int, stop: int, cols: int) -> Tensor:
        """What is added to rows `start` to `stop`, float32 [stop - start, cols]. SkyrunError if it is not finite."""
        rows = self._read(start, stop, cols)
        if not rows.isfinite().all():
            message = f"what {self.up.file} adds to it is infinite or NaN"
            raise SkyrunError(message, "download the adapter again, or add less of it")
        return rows

    def _read(self, start: int, stop: int, cols: int) -> Tensor:
        if self.down is None:
            return self.scale * self.up.read().view(-1, cols)[start:stop]
        up, down = (part.read().view(part.shape[0], -1) for part in (self.up, self.down))
        inner = down.shape[1] // cols  # rows of the tensor for each of up: 1, but for convolutions
        first, last = start // inner, -(-stop // inner)
        rows = (self.scale * up[first:last] @ down).view(-1, cols)
        return rows[start - first * inner : stop - first * inner]

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"up": self.up.as_json(), "down": self.down.as_json() if self.down else None, "scale": self.scale}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "Added":
        down = SourceTensor.from_json(said["down"]) if said["down"] else None
        return cls(SourceTensor.from_json(said["up"]), down, said["scale"])


class Blocks(NamedTuple):
    """A grid of scales [rows, cols]. height, width: how many rows and columns of the weight each scale is for."""

    rows: int
    cols: int
    height: int
    width: int


def scale_blocks(weight: SourceTensor, scale: SourceTensor) -> Blocks | None:
    """The grid that scales form over a weight; None if they do not fit it."""
    sides = [*scale.shape]
    while len(sides) > 2 and sides[-1] == 1:  # some programs keep an axis for the values of a block
        sides.pop()
    if scale.numel == 1:
        sides = [1, 1]
    elif len(sides) == 1:
        sides = [sides[0], 1]
    if len(scale.shape) == 1 < scale.numel != weight.rows:
        return None
    if len(sides) != 2 or sides[0] == 1 < sides[1] == weight.rows:  # one scale per row, stored as a row
        sides = [scale.numel, 1]
    height, width = _block_side(weight.rows, sides[0]), _block_side(weight.cols, sides[1])
    return Blocks(sides[0], sides[1], height, width) if height and width else None


def _block_side(size: int, count: int) -> int:
    """Rows or columns of a block if `count` blocks cover `size`, 0 if that is impossible. The last may be smaller."""
    if count in (1, size):
        return size // count
    usual = next((side for side in _BLOCK_SIDES if -(-size // side) == count), 0)
    return usual or (size // count if count and size % count == 0 else 0)
