"""wav2vec2: encodes speech to the outputs of all its layers, one row for every frame of a video.

It is small enough to stay in memory whole. Weights have the names of transformers.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from skyrun.errors import SkyrunError
from skyrun.kernels.files.fitting import check_tensors
from skyrun.kernels.files.safetensors_header import own_words, read_safetensors_header
from skyrun.kernels.name_tables import WAV2VEC2

RATE = 16000  # samples per second
_CONVERT = "convert the published checkpoint: skyrun convert CHECKPOINT -o DIR"
_CHUNK = 512  # features that are computed at a time: the widest activations of long speech would not fit
_TINY = 1e-7
_CONVS, _MOST = 7, 1000  # convolutions, and heads, layers or samples of a stride that are believed
_FLOAT = ("F32", "F16", "BF16")


class _Config(NamedTuple):
    """What the tensors do not say."""

    strides: list[int]
    eps: float
    heads: int
    layers: int


def check_wav2vec2(path: Path) -> None:
    """Raise SkyrunError if a tensor is missing or does not fit the others. Reads the header only."""
    header = read_safetensors_header(path)
    config = _config(path, header.metadata)
    if strange := [f"{name} is {t.dtype}" for name, t in header.tensors.items() if t.dtype not in _FLOAT]:
        raise SkyrunError(f"{path} cannot be used: {strange[0]}, expected F32, F16 or BF16", _CONVERT)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    dims = check_tensors(path, WAV2VEC2, shapes, _CONVERT, config.layers)
    if dims["dim"] % config.heads or dims["dim"] % dims["group"]:
        parts = f"{config.heads} heads or groups of {dims['group']}"
        raise SkyrunError(f"{path} cannot divide {dims['dim']} channels among {parts}", _CONVERT)


def _config(path: Path, metadata: Mapping[str, str]) -> _Config:
    """The entry `skyrun`, or wav2vec2 base where there is none."""
    try:
        said = own_words(metadata)
    except ValueError as error:
        raise SkyrunError(f"{path} has metadata that is not JSON: {error}", _CONVERT) from error
    strides, eps = said.get("conv_stride", [5, 2, 2, 2, 2, 2, 2]), said.get("layer_norm_eps", 1e-5)
    heads, layers = (said.get(f"num_{what}", 12) for what in ("attention_heads", "hidden_layers"))
    whole = [*strides, heads, layers] if isinstance(strides, list) and len(strides) == _CONVS else [None]
    if not all(type(number) is int and 0 < number <= _MOST for number in whole) or not (
        isinstance(eps, (int, float)) and 0 < eps < 1
    ):
        raise SkyrunError(f"{path} says {said}, expected the settings of wav2vec2", _CONVERT)
    return _Config(strides, float(eps), heads, layers)


class Wav2Vec2:
    """The audio encoder on a device, float32."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path, self._device = path, device
        self._weights: dict[str, Tensor] = {}
        try:
            with safe_open(str(path), framework="pt") as file:
                self._weights = {name: file.get_tensor(name).to(device, torch.float32) for name in file.keys()}  # noqa: SIM118
                config = _config(path, file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise SkyrunError(f"cannot read {path}: {error}", _CONVERT) from error
        self._strides, self._eps, self._heads, self.layers = config
        self._kernels = [self._w(f"{_conv(layer)}.weight").shape[2] for layer in range(len(self._strides))]

    @property
    def channels(self) -> int:
        """Values per layer and frame."""
        return len(self._w("encoder.layer_norm.weight"))

    @property
    def shortest(self) -> int:
        """How many samples one feature needs."""
        return self._samples(0, 1)[1]

    def encode(self, wave: Tensor, frames: int) -> Iterator[Tensor]:
        """Encode samples float32 [n] and yield the output of each layer, float32 [frames, channels].

        Features are interpolated to the frames of the video before the first layer.
        """
        wave = wave.to(self._device, torch.float32)
        wave = (wave - wave.mean()) / torch.sqrt(wave.var(correction=0) + _TINY)
        features = self.features(wave)
        features = F.interpolate(features.unsqueeze(0), frames, mode="linear", align_corners=True).squeeze(0).T
        x = self._linear(self._norm(features, "feature_projection.layer_norm"), "feature_projection.projection")
        x = self._norm(x + self._positions(x), "encoder.layer_norm")
        for layer in range(self.layers):
            x = self._layer(x, f"encoder.layers.{layer}")
            yield x

    def features(self, wave: Tensor) -> Tensor:
        """Normalised samples [n] -> [conv, features], computed in chunks that read all the samples they depend on."""
        count = len(wave)
        for kernel, stride in zip(self._kernels, self._strides, strict=True):
            count = (count - kernel) // stride + 1
        mean, scale = self._statistics(wave)
        parts = []
        for start in range(0, count, _CHUNK):
            first, last = self._samples(start, min(start + _CHUNK, count))
            parts.append(self._convolve(wave[first:last], mean, scale))
        return torch.cat(parts, 1)

    def _convolve(self, wave: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        x = self._first(wave)
        weight, bias = (self._w(f"{_conv(0).removesuffix('.conv')}.layer_norm.{part}") for part in ("weight", "bias"))
        x = F.gelu((x - mean) * (scale * weight.unsqueeze(1)) + bias.unsqueeze(1))
        for layer, stride in enumerate(self._strides[1:], 1):
            x = F.gelu(F.conv1d(x, self._w(f"{_conv(layer)}.weight"), stride=stride))
        return x

    def _first(self, wave: Tensor) -> Tensor:
        return F.conv1d(wave.unsqueeze(0), self._w(f"{_conv(0)}.weight"), stride=self._strides[0])

    def _statistics(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / deviation of the channels of the first convolution over all of the speech, [conv, 1] each."""
        kernel, stride = self._kernels[0], self._strides[0]
        count = (len(wave) - kernel) // stride + 1
        total, squares = (torch.zeros(1, 1, dtype=torch.float64, device=wave.device) for _ in range(2))
        for start in range(0, count, _CHUNK * 64):
            last = min(start + _CHUNK * 64, count)
            x = self._first(wave[start * stride : (last - 1) * stride + kernel]).double()
            total, squares = total + x.sum(1, keepdim=True), squares + x.square().sum(1, keepdim=True)
        mean, square = total / count, squares / count
        scale = torch.rsqrt((square - mean.square()).clamp_min(0) + self._eps)
        return mean.float(), scale.float()

    def _samples(self, first: int, last: int) -> tuple[int, int]:
        """The range of samples that features `first` to `last` depend on."""
        for kernel, stride in zip(self._kernels[::-1], self._strides[::-1], strict=True):
            first, last = first * stride, (last - 1) * stride + kernel
        return first, last

    def _positions(self, x: Tensor) -> Tensor:
        """The positional embedding: a grouped convolution over time. Its weights are stored as direction and length."""
        name = "encoder.pos_conv_embed.conv"
        direction, length = self._w(f"{name}.weight_v"), self._w(f"{name}.weight_g")
        weight = length * direction / torch.linalg.vector_norm(direction, dim=(0, 1), keepdim=True)
        taps, groups = weight.shape[2], len(weight) // weight.shape[1]
        out = F.conv1d(x.T.unsqueeze(0), weight, self._w(f"{name}.bias"), padding=taps // 2, groups=groups)
        positions: Tensor = F.gelu(out[0, :, : len(x)]).T
        return positions

    def _layer(self, x: Tensor, name: str) -> Tensor:
        q, k, v = (
            self._linear(x, f"{name}.attention.{part}_proj")
            .unflatten(1, (self._heads, -1))
            .transpose(0, 1)
            .unsqueeze(0)
            for part in "qkv"
        )
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1).flatten(1)
        x = self._norm(x + self._linear(mixed, f"{name}.attention.out_proj"), f"{name}.layer_norm")
        hidden = F.gelu(self._linear(x, f"{name}.feed_forward.intermediate_dense"))
        return self._norm(x + self._linear(hidden, f"{name}.feed_forward.output_dense"), f"{name}.final_layer_norm")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self._w(f"{name}.weight"), self._w(f"{name}.bias"), self._eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._w(f"{name}.weight"), self._w(f"{name}.bias"))

    def _w(self, name: str) -> Tensor:
        if name not in self._weights:
            raise SkyrunError(f"{self._path} has no tensor {name}: it is not wav2vec2", _CONVERT)
        return self._weights[name]


def _conv(layer: int) -> str:
    return f"feature_extractor.conv_layers.{layer}.conv"
