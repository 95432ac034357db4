"""Tensors of a GGUF file as the models use them: by name, and still quantized."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from io import FileIO

import torch
from torch import Tensor

from skyrun.errors import SkyrunError
from skyrun.kernels import QuantizedWeight, dequantize, float16_sums, linear
from skyrun.kernels.files.adapter import DTYPES, Fitted
from skyrun.kernels.files.gguf_file import GGUFFile, TensorInfo
from skyrun.kernels.files.reading import open_unbuffered, read_into
from skyrun.kernels.files.safetensors_header import StoredTensor
from skyrun.kernels.planes import needs_planes
from skyrun.kernels.rotated import GROUP, RotatedInt8
from skyrun.streaming.low_rank import Addition, add_products, with_additions

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Weight = Tensor | QuantizedWeight
Additions = Mapping[str, Sequence[Addition]]  # by the name of the tensor
Observe = Callable[[str, Tensor], None]  # called with the name and input [..., cols] of every linear layer


def has_planes(info: TensorInfo) -> bool:
    """Whether a tensor must be repacked into planes for the kernels."""
    return len(info.shape) == 2 and needs_planes(info.format.name)


def as_weight(data: Tensor, info: TensorInfo, planar: bool = False, fast: bool = False) -> Weight:
    """A tensor as a view of its bytes: a plain tensor, or a QuantizedWeight for a quantized matrix.

    Some tools quantize vectors too; those are decoded here.

    Args:
        data: uint8 [nbytes].
        info: the tensor's shape and type.
        planar: whether tensors that need planes were repacked.
        fast: whether matrices are multiplied in rotated int8.
    """
    rotates = fast and len(info.shape) == 2 and info.shape[1] % GROUP == 0
    if info.format.name in _PLAIN and not rotates:
        return data.view(_PLAIN[info.format.name]).view(info.shape)
    if len(info.shape) != 2:
        return dequantize(data, info.format.name).view(info.shape)
    blocks = data.view(-1, info.format.row_bytes(info.shape[-1]))
    return QuantizedWeight(blocks, info.format.name, planar and has_planes(info), rotates, info.name)


class Weights:
    """Weights by name, of one block or of the layers outside of blocks.

    owner: the block or file, named in errors. observe: called with the input of every linear layer.
    attention: precision of the block's attention, of kernels.quantized_keys. additions: of adapters.
    """

    def __init__(
        self,
        owner: str,
        weights: dict[str, Weight],
        observe: Observe | None = None,
        attention: str = "exact",
        additions: Additions | None = None,
    ) -> None:
        self.owner, self._weights, self._observe = owner, weights, observe
        self._additions = additions or {}
        self.attention = attention

    def __getitem__(self, name: str) -> Weight:
        if name not in self._weights:
            raise SkyrunError(f"{self.owner} has no tensor {name}", "convert the checkpoint again")
        return self._weights[name]

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded tensor, with what adapters add to it."""
        weight = self[name]
        decoded = weight.dense(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)
        return with_additions(decoded, self._additions.get(name, ()))

    def rotated(self, *names: str) -> bool:
        """Whether all of these layers take rows in rotated int8. With an observer they do not: it needs plain rows."""
        weights = [self[f"{name}.weight"] for name in names]
        fast = all(isinstance(weight, QuantizedWeight) and weight.fast for weight in weights)
        return fast and self._observe is None

    def handed_on(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of what the block's layers hand to each other for tokens of a dtype, which they stay in."""
        quantized = [weight for weight in self._weights.values() if isinstance(weight, QuantizedWeight)]
        plain = self._observe is not None or not quantized or any(weight.fast for weight in quantized)
        return dtype if plain else float16_sums.handed_on(dtype, device)

    def linear(
        self, name: str, x: Tensor | RotatedInt8, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Apply the linear layer `name`, with its bias if it has one, to x [..., cols] -> [..., rows].

        With a residual the result is residual + gate * output, or residual + output without a gate, in its dtype.
        """
        if self._observe is not None:
            assert isinstance(x, Tensor)
            self._observe(name, x)
        bias = self.dense(f"{name}.bias") if f"{name}.bias" in self._weights else None
        y = linear(x, self[f"{name}.weight"], bias, gate=gate, residual=residual)
        if additions := self._additions.get(f"{name}.weight"):
            add_products(y, x, additions, gate if residual is not None else None)
        return y


def load_weights(
    file: GGUFFile, infos: Mapping[str, TensorInfo], device: torch.device, additions: Additions | None = None
) -> Weights:
    """Read tensors that stay in memory. They get the names of `infos`. additions: of adapters."""
    weights = {
        name: as_weight(torch.frombuffer(file.read(info), dtype=torch.uint8).to(device), info)
        for name, info in infos.items()
    }
    return Weights(str(file.path), weights, additions=additions)


def load_additions(adapters: Sequence[Fitted], streamed: str, device: torch.device) -> Additions:
    """Read what adapters add to tensors that stay in memory: all whose names do not begin with `streamed`."""
    additions: dict[str, list[Addition]] = defaultdict(list)
    for adapter in adapters:
        with open_unbuffered(adapter.path) as source:
            for name, update in adapter.outside(streamed).items():
                *down, up = (_read_stored(source, part).to(device) for part in update.parts)
                additions[name].append(Addition(up, down[0] if down else None, adapter.strength * update.scale))
    return additions


def _read_stored(source: FileIO, stored: StoredTensor) -> Tensor:
    data = bytearray(stored.nbytes)
    read_into(source, memoryview(data), stored.offset)
    dtype = getattr(torch, DTYPES[stored.dtype])
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(stored.shape)


def read_rows(file: GGUFFile, info: TensorInfo, rows: list[int]) -> Tensor:
    """Read and decode some rows of a matrix: float32 [len(rows), cols]. The other rows are not read."""
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
