"""Tensors of a GGUF file as the models use them: still in block form, by name."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from skyrun.errors import SkyrunError
from skyrun.kernels import QuantizedWeight, dequantize, linear
from skyrun.kernels.gguf_file import GGUFFile, TensorInfo
from skyrun.kernels.reading import open_unbuffered, read_into

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Weight = Tensor | QuantizedWeight
Observe = Callable[[str, Tensor], None]  # sees the name of every linear layer that is used, and its input [..., cols]


def as_weight(data: Tensor, info: TensorInfo) -> Weight:
    """uint8 [nbytes] -> a view of it: a plain tensor of the info's shape, or for a quantized matrix its blocks.

    Some tools quantize vectors too; those are decoded here.
    """
    if info.format.name in _PLAIN:
        return data.view(_PLAIN[info.format.name]).view(info.shape)
    if len(info.shape) != 2:
        return dequantize(data, info.format.name).view(info.shape)
    return QuantizedWeight(data.view(-1, info.format.row_bytes(info.shape[-1])), info.format.name)


def shapes_only(owner: str, infos: Mapping[str, TensorInfo]) -> "Weights":
    """Weights without numbers, to run a model on shapes alone."""
    return Weights(owner, {name: torch.empty(info.shape, device="meta") for name, info in infos.items()})


class Weights:
    """Weights of one block, or of what lies outside the blocks, by name."""

    def __init__(self, owner: str, weights: dict[str, Weight], observe: Observe | None = None) -> None:
        self._owner, self._weights, self._observe = owner, weights, observe

    def __getitem__(self, name: str) -> Weight:
        if name not in self._weights:
            raise SkyrunError(f"{self._owner} has no tensor {name}", "convert the checkpoint again")
        return self._weights[name]

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor in plain numbers."""
        weight = self[name]
        return weight.dense(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x [..., cols] through the layer called `name`, with its bias if it has one -> [..., rows]."""
        if self._observe is not None:
            self._observe(name, x)
        bias = self.dense(f"{name}.bias") if f"{name}.bias" in self._weights else None
        return linear(x, self[f"{name}.weight"], bias)


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
