"""Tensors of a GGUF file as the models use them: still in block form, by name."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from skyrun.errors import SkyrunError
from skyrun.kernels import QuantizedWeight, dequantize, linear
from skyrun.kernels.gguf_file import GGUFFile, TensorInfo
from skyrun.kernels.planes import needs_planes
from skyrun.kernels.reading import open_unbuffered, read_into
from skyrun.kernels.rotated import GROUP, RotatedInt8

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Weight = Tensor | QuantizedWeight
Observe = Callable[[str, Tensor], None]  # sees the name of every linear layer that is used, and its input [..., cols]


def has_planes(info: TensorInfo) -> bool:
    """Whether the fields of a tensor's blocks should lie apart where kernels read them."""
    return len(info.shape) == 2 and needs_planes(info.format.name)


def as_weight(data: Tensor, info: TensorInfo, planar: bool = False, fast: bool = False) -> Weight:
    """uint8 [nbytes] -> a view of it: a plain tensor of the info's shape, or for a quantized matrix its blocks.

    planar: data that `has_planes` lies so. fast: multiply matrices in rotated int8. Some tools quantize vectors too;
    those are decoded here.
    """
    rotates = fast and len(info.shape) == 2 and info.shape[1] % GROUP == 0
    if info.format.name in _PLAIN and not rotates:
        return data.view(_PLAIN[info.format.name]).view(info.shape)
    if len(info.shape) != 2:
        return dequantize(data, info.format.name).view(info.shape)
    blocks = data.view(-1, info.format.row_bytes(info.shape[-1]))
    return QuantizedWeight(blocks, info.format.name, planar and has_planes(info), rotates, info.name)


class Weights:
    """Weights of one block, or of what lies outside the blocks, by name. fast: speed may cost some accuracy."""

    def __init__(
        self, owner: str, weights: dict[str, Weight], observe: Observe | None = None, fast: bool = False
    ) -> None:
        self._owner, self._weights, self._observe = owner, weights, observe
        self.fast = fast

    def __getitem__(self, name: str) -> Weight:
        if name not in self._weights:
            raise SkyrunError(f"{self._owner} has no tensor {name}", "convert the checkpoint again")
        return self._weights[name]

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor in plain numbers."""
        weight = self[name]
        return weight.dense(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)

    def rotated(self, *names: str) -> bool:
        """Whether the layers of these names all take rows in rotated int8. An observer sees plain ones."""
        weights = [self[f"{name}.weight"] for name in names]
        fast = all(isinstance(weight, QuantizedWeight) and weight.fast for weight in weights)
        return fast and self._observe is None

    def linear(
        self, name: str, x: Tensor | RotatedInt8, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """x [..., cols] through the layer called `name`, with its bias if it has one -> [..., rows].

        With a residual the result is residual + gate * output, without a gate residual + output.
        """
        if self._observe is not None:
            assert isinstance(x, Tensor)
            self._observe(name, x)
        bias = self.dense(f"{name}.bias") if f"{name}.bias" in self._weights else None
        return linear(x, self[f"{name}.weight"], bias, gate=gate, residual=residual)


def load_weights(file: GGUFFile, infos: Mapping[str, TensorInfo], device: torch.device) -> Weights:
    """Read tensors that stay in memory, by the names given."""
    weights = {
        name: as_weight(torch.frombuffer(file.read(info), dtype=torch.uint8).to(device), info)
        for name, info in infos.items()
    }
    return Weights(str(file.path), weights)


def read_rows(file: GGUFFile, info: TensorInfo, rows: list[int]) -> Tensor:
    """Some rows of a matrix, decoded: float32 [len(rows), cols]. The rest of the matrix is never read."""
    row_bytes = info.format.row_bytes(info.shape[-1])
    if rows and not 0 <= min(rows) <= max(rows) < info.shape[0]:
        raise SkyrunError(
            f"row {max(rows)} of {info.name} was asked for, {file.path} has {info.shape[0]}",
            "its tokenizer belongs to another model: convert the checkpoint again",
        )
    data = bytearray(row_bytes * len(rows))
    with open_unbuffered(file.path) as source:
        for place, row in enumerate(rows):
            target = memoryview(data)[place * row_bytes : (place + 1) * row_bytes]
            read_into(source, target, info.offset + row * row_bytes)
    return dequantize(torch.frombuffer(data, dtype=torch.uint8).view(len(rows), row_bytes), info.format.name)
