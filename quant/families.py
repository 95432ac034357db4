"""The parts of a checkpoint: for each its tables of names and types, and what its file says about itself."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.names import R2V_TRANSFORMER, UMT5_ENCODER, WAN_VAE, Entry, match
from skyrun.quant.checkpoint import Component
from skyrun.quant.recipes import Choice, text_encoder_type, transformer_type

_HEAD_DIM = 128  # of every Wan transformer


@dataclass(frozen=True)
class Family:
    """How one component is written. An empty architecture means safetensors instead of GGUF."""

    role: str
    basename: str
    architecture: str
    entries: list[Entry]
    choose_type: Callable[[str, tuple[int, ...], str, str], Choice]
    metadata: dict[str, Any]


def _size(component: Component, name: str, axis: int) -> int:
    """One size of a tensor that the dims are read from; such a tensor has to be there."""
    tensor = component.tensors.get(name)
    if tensor is None or len(tensor.shape) <= axis:
        found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
        raise SkyrunError(
            f"{name} {found} in {component.folder}",
            "expected a SkyReels-V3 R2V checkpoint; download it again if it is one",
        )
    return tensor.shape[axis]


def _layers(component: Component, prefix: str) -> int:
    """How many blocks there are: their names begin with the prefix and a number. Gaps show as missing tensors."""
    numbers = (name.removeprefix(prefix).split(".")[0] for name in component.tensors if name.startswith(prefix))
    return len({number for number in numbers if number.isdecimal()})


def _number(component: Component, key: str, default: float) -> float:
    value = component.config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SkyrunError(f"config.json in {component.folder} says {key} = {value!r}", "expected a number")
    return float(value)


def _agree(component: Component, expected: dict[str, int]) -> None:
    """The config must say what the tensors say."""
    problems = [
        f"config.json says {key} = {component.config[key]}, the tensors say {value}"
        for key, value in expected.items()
        if component.config.get(key) not in (None, value)
    ]
    if problems:
        raise SkyrunError.listing(f"{component.folder} contradicts itself", problems, "download the checkpoint again")


def transformer(component: Component) -> Family:
    """The reference-to-video transformer, written with original Wan names."""
    dims = {
        "dim": _size(component, "patch_embedding.weight", 0),
        "in": _size(component, "patch_embedding.weight", 1),
        "out": _size(component, "proj_out.weight", 0) // 4,
        "ffn": _size(component, "blocks.0.ffn.net.0.proj.weight", 0),
        "text": _size(component, "condition_embedder.text_embedder.linear_1.weight", 1),
        "freq": _size(component, "condition_embedder.time_embedder.linear_1.weight", 1),
        "layers": _layers(component, "blocks."),
    }
    heads = dims["dim"] // _HEAD_DIM
    _agree(
        component,
        {
            "num_attention_heads": heads,
            "attention_head_dim": _HEAD_DIM,
            "num_layers": dims["layers"],
            "ffn_dim": dims["ffn"],
            "in_channels": dims["in"],
            "out_channels": dims["out"],
            "text_dim": dims["text"],
            "freq_dim": dims["freq"],
        },
    )
    shapes = {name: tensor.shape for name, tensor in component.tensors.items()}
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.license": "other",
        "general.license.name": "Skywork Community License",
        "skyrun.task": "r2v",
        "skyrun.dim": dims["dim"],
        "skyrun.heads": heads,
        "skyrun.layers": dims["layers"],
        "skyrun.ffn_dim": dims["ffn"],
        "skyrun.in_channels": dims["in"],
        "skyrun.out_channels": dims["out"],
        "skyrun.text_dim": dims["text"],
        "skyrun.freq_dim": dims["freq"],
        "skyrun.eps": _number(component, "eps", 1e-6),
    }
    entries = match(str(component.folder), R2V_TRANSFORMER, dims, shapes)
    return Family("transformer", "SkyReels-V3-R2V", "wan", entries, transformer_type, metadata)


def text_encoder(component: Component, tokenizer: str) -> Family:
    """The UMT5 encoder, written as GGUF's t5encoder with its tokenizer inside."""
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    dims = {
        "vocab": _size(component, "shared.weight", 0),
        "dim": _size(component, "shared.weight", 1),
        "inner": _size(component, "encoder.block.0.layer.0.SelfAttention.q.weight", 0),
        "ffn": _size(component, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
        "buckets": _size(component, bias, 0),
        "heads": _size(component, bias, 1),
        "layers": _layers(component, "encoder.block."),
    }
    _agree(
        component,
        {
            "d_model": dims["dim"],
            "d_kv": dims["inner"] // dims["heads"],
            "d_ff": dims["ffn"],
            "num_heads": dims["heads"],
            "num_layers": dims["layers"],
            "vocab_size": dims["vocab"],
        },
    )
    shapes = {name: tensor.shape for name, tensor in component.tensors.items()}
    metadata = {
        "general.type": "model",
        "t5encoder.block_count": dims["layers"],
        "t5encoder.context_length": 512,
        "t5encoder.embedding_length": dims["dim"],
        "t5encoder.feed_forward_length": dims["ffn"],
        "t5encoder.attention.head_count": dims["heads"],
        "t5encoder.attention.key_length": dims["inner"] // dims["heads"],
        "t5encoder.attention.value_length": dims["inner"] // dims["heads"],
        "t5encoder.attention.relative_buckets_count": dims["buckets"],
        "t5encoder.attention.layer_norm_rms_epsilon": _number(component, "layer_norm_epsilon", 1e-6),
        "t5encoder.vocab_size": dims["vocab"],
        "tokenizer.huggingface.json": tokenizer,
    }
    entries = match(str(component.folder), UMT5_ENCODER, dims, shapes)
    return Family("text_encoder", "umt5-encoder", "t5encoder", entries, text_encoder_type, metadata)


def vae(component: Component) -> Family:
    """The Wan autoencoder, written as safetensors with original names: every tool loads that, none a GGUF of it."""
    dims = {
        "base": _size(component, "encoder.conv_in.weight", 0),
        "z": _size(component, "post_quant_conv.weight", 0),
    }
    _agree(component, {"base_dim": dims["base"], "z_dim": dims["z"]})
    shapes = {name: tensor.shape for name, tensor in component.tensors.items()}
    said: dict[str, Any] = {"role": "vae", "base_dim": dims["base"], "z_dim": dims["z"]}
    for key in ("latents_mean", "latents_std"):
        if key in component.config:
            values = component.config[key]
            numbers = isinstance(values, list) and [v for v in values if isinstance(v, (int, float))]
            if not numbers or len(numbers) != len(values) or len(values) != dims["z"]:
                hint = f"expected {dims['z']} numbers"
                raise SkyrunError(f"config.json in {component.folder} says {key} = {values!r}", hint)
            said[key] = values
    metadata = {"skyrun": json.dumps(said)}  # one entry: safetensors writes several in random order
    entries = match(str(component.folder), WAN_VAE, dims, shapes)
    return Family("vae", "wan-vae", "", entries, lambda name, shape, source, quant: Choice(source), metadata)
