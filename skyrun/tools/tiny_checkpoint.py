"""A small checkpoint in the published layout: the real architecture with seeded random weights."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.files.atomic import replacing
from skyrun.kernels.files.names import Shape
from skyrun.kernels.name_tables import UMT5_ENCODER, WAN_TRANSFORMER, WAN_VAE
from skyrun.models.dit_header import HEAD_DIM

Shapes = dict[str, Shape]

_SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
_WORDS = "a an the of in on and with person man woman child is are walking talking looking at camera city sea red blue"


@dataclass(frozen=True)
class CheckpointDims:
    """Sizes of a checkpoint. dim: a multiple of 128, the width of a head. shard_bytes: of the transformer's files."""

    dim: int = 512
    layers: int = 6
    ffn: int = 1024
    text: int = 256
    text_layers: int = 2
    vae_base: int = 8
    shard_bytes: int = 16 << 20

    @property
    def transformer(self) -> dict[str, int]:
        channels = {"in": 16, "out": 16, "freq": 256}
        return {"dim": self.dim, "layers": self.layers, "ffn": self.ffn, "text": self.text} | channels

    @property
    def text_encoder(self) -> dict[str, int]:
        sizes = {"dim": self.text, "inner": self.text, "ffn": 2 * self.text, "layers": self.text_layers}
        return sizes | {"vocab": 256, "buckets": 32, "heads": 4}


def write_checkpoint(folder: Path, dims: CheckpointDims, seed: int = 0) -> None:
    """Write transformer/, text_encoder/, tokenizer/ and vae/. The same dims and seed give the same files.

    Args:
        folder: The folder of the checkpoint.
        dims: Its dims.
        seed: The seed of the random weights.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    _write_sharded(
        folder / "transformer", WAN_TRANSFORMER.shapes("diffusers", dims.transformer), dims.shard_bytes, generator
    )
    _write_config(folder / "transformer", _transformer_config(dims))
    encoder = dict(_weights(UMT5_ENCODER.shapes("transformers", dims.text_encoder), generator))
    _write_whole(folder / "text_encoder" / "model.safetensors", encoder)
    _write_config(folder / "text_encoder", _text_encoder_config(dims))
    vae = dict(_weights(WAN_VAE.shapes("diffusers", {"base": dims.vae_base, "z": 16}), generator))
    _write_whole(folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
    _write_config(folder / "vae", {"_class_name": "AutoencoderKLWan", "base_dim": dims.vae_base, "z_dim": 16})
    _write_text(folder / "tokenizer" / "tokenizer.json", ascii_tokenizer().to_str(pretty=True))


def _weights(shapes: Shapes, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        yield name, _weight(name, shape, generator)


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random weight, scaled so that activations keep their magnitude from layer to layer."""
    noise: Tensor = torch.randn(shape, generator=generator)
    if name.endswith("scale_shift_table"):
        return noise / math.sqrt(shape[-1])
    if name.endswith((".norm2.weight", ".norm2.bias")):  # the affine norm, which is published in float32
        return 0.05 * noise + (1 if name.endswith("weight") else 0)
    if name.endswith(".bias"):
        return (0.02 * noise).bfloat16()
    if name.endswith("gamma") or len(shape) == 1:
        return (1 + 0.05 * noise).bfloat16()
    if name == "shared.weight":
        return noise.bfloat16()
    if name.endswith("SelfAttention.q.weight"):  # UMT5 does not divide scores by sqrt(d), so the weight does
        return (noise / shape[1]).bfloat16()
    if shape[-1] == 3:
        return (_smooth(noise) / math.sqrt(shape[1])).bfloat16()
    return (noise / math.sqrt(noise[0].numel())).bfloat16()


def _smooth(noise: Tensor) -> Tensor:
    """A convolution that mixes channels at random and blurs in space and time, so that clips are not pure noise."""
    blur = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
    if noise.dim() == 5:
        blur = blur.expand(noise.shape[2], 3, 3) / noise.shape[2]
    return noise.flatten(2)[:, :, :1].view(*noise.shape[:2], *[1] * blur.dim()) * blur


def _write_sharded(folder: Path, shapes: Shapes, shard_bytes: int, generator: torch.Generator) -> None:
    """Write shards of about that many bytes and their index, with one shard in memory at a time."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total, last = 0, list(shapes)[-1]
    for name, weight in _weights(shapes, generator):
        pending[name] = weight
        if sum(tensor.nbytes for tensor in pending.values()) >= shard_bytes or name == last:
            shards.append(list(pending))
            total += sum(tensor.nbytes for tensor in pending.values())
            _write_whole(folder / f"shard-{len(shards)}.safetensors", pending)
            pending = {}
    names = [f"diffusion_pytorch_model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for number, name in enumerate(names):
        (folder / f"shard-{number + 1}.safetensors").replace(folder / name)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_text(folder / "diffusion_pytorch_model.safetensors.index.json", json.dumps(index, indent=1))


def _write_whole(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with replacing(path) as partial:
            save_file(tensors, partial)
    except SafetensorError as error:
        raise SkyrunError(f"cannot write {path}: {error}", "check free space and permissions", FAILED) from error


def _write_config(folder: Path, config: dict[str, object]) -> None:
    _write_text(folder / "config.json", json.dumps(config, indent=1))


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _transformer_config(dims: CheckpointDims) -> dict[str, object]:
    return {
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": dims.dim // HEAD_DIM,
        "num_layers": dims.layers,
        "ffn_dim": dims.ffn,
        "text_dim": dims.text,
        "in_channels": 16,
        "out_channels": 16,
        "freq_dim": 256,
        "eps": 1e-6,
        "patch_size": [1, 2, 2],
    }


def _text_encoder_config(dims: CheckpointDims) -> dict[str, object]:
    sizes = dims.text_encoder
    return {
        "model_type": "umt5",
        "d_model": sizes["dim"],
        "d_kv": sizes["inner"] // sizes["heads"],
        "d_ff": sizes["ffn"],
        "num_heads": sizes["heads"],
        "num_layers": sizes["layers"],
        "vocab_size": sizes["vocab"],
        "layer_norm_epsilon": 1e-6,
    }


def ascii_tokenizer() -> Tokenizer:
    """An untrained tokenizer with printable ASCII and a few words; everything else is <unk>."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = [(piece, 0.0) for piece in _SPECIAL] + [("▁", -3.0)]
    pieces += [(character, -6.0) for character in characters] + [(f"▁{word}", -5.0) for word in _WORDS.split()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer
