"""A tensor that lies in a file of any format: where, and how to read rows of it."""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skyrun.kernels import FORMATS, dequantize
from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.reading import open_unbuffered, read_into

PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

READABLE = tuple(dict.fromkeys((*PLAIN, *FORMATS)))

Stamp = tuple[int, int, int]


def stamp(file: Path) -> Stamp:
    """What changes when a file is written again: its inode, size and time. SkyrunError if it has gone."""
    try:
        status = file.stat()
    except OSError as error:
        raise SkyrunError(f"cannot read {file}: {error}", "restore it and convert again") from error
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class SourceTensor:
    """A tensor, not read yet.

    dtype: F32, F16, BF16, F8_E4M3, F8_E5M2 or a type of GGUF such as Q8_0. offset: of its first byte in the file.
    scale: what the stored numbers are multiplied by, one number or one per row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    scale: "SourceTensor | None" = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix; a vector or a scalar has one."""
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
        """Rows `start` to `stop` as float32 [stop - start, cols]. SkyrunError if the file has gone or shrunk."""
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start} to {stop} of {self.name}, which has {self.rows}")
        data = torch.empty(stop - start, self.row_bytes, dtype=torch.uint8)
        with open_unbuffered(self.file) as file:
            read_into(file, data.view(-1).numpy().data, self.offset + start * self.row_bytes)
        weights = data.view(PLAIN[self.dtype]).float() if self.dtype in PLAIN else dequantize(data, self.dtype)
        if self.scale is None:
            return weights
        scale = self.scale.read().view(-1, 1)
        return weights.mul_(scale if len(scale) == 1 else scale[start:stop])

    def as_json(self) -> dict[str, Any]:
        """Enough for another process to read it."""
        scale = self.scale.as_json() if self.scale else None
        place = {"file": str(self.file), "offset": self.offset, "scale": scale}
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype} | place

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "SourceTensor":
        scale = cls.from_json(said["scale"]) if said["scale"] else None
        return cls(said["name"], tuple(said["shape"]), said["dtype"], Path(said["file"]), said["offset"], scale)


_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale", ".comfy_quant")  # of activations, or notes for one program


def apply_scales(tensors: dict[str, SourceTensor]) -> tuple[dict[str, SourceTensor], list[str]]:
    """Give weights the scales that lie beside them (`fp8_scaled`); also what is wrong with scales.

    The tensors that come back are the weights alone.
    """
    plain = dict(tensors)
    problems = []
    for name, scale in tensors.items():
        if name.split(".")[-1] == "scaled_fp8" or name.endswith(_INPUT_SCALES):
            del plain[name]
        elif name.endswith(_WEIGHT_SCALES):
            del plain[name]
            weight = plain.get(f"{name.rsplit('.', 1)[0]}.weight")
            if weight is None:
                problems.append(f"{name} in {scale.file.name} belongs to no weight")
            elif scale.numel not in (1, weight.rows) or scale.dtype not in ("F32", "F16", "BF16"):
                expected = f"expected one number or {weight.rows}"
                problems.append(f"{name} in {scale.file.name} is {scale.dtype} {list(scale.shape)}, {expected}")
            else:
                plain[weight.name] = replace(weight, scale=scale)
    return plain, problems
