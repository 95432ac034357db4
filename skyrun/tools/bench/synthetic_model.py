"""Write model files of the real shapes with random weights, to measure a card and a disk without a download."""

from collections.abc import Iterator, Mapping
from math import prod, sqrt
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from skyrun.kernels.formats import FORMATS
from skyrun.kernels.name_tables import UMT5_ENCODER, WAN_TRANSFORMER, WAN_VAE
from skyrun.planning.published import TEXT_LAYERS, UMT5_XXL, VAE
from skyrun.tasks.skyreels_v3 import WAN_14B
from skyrun.tools.bench.synthetic_weight import random_blocks
from skyrun.tools.tiny_checkpoint import ascii_tokenizer

Dims = Mapping[str, int]
Shape = tuple[int, ...]

# Sizes of the published models, by name.
MODELS: dict[str, dict[str, Dims]] = {"r2v-14b": {"transformer": WAN_14B, "text_encoder": UMT5_XXL, "vae": VAE}}
_PATTERN_ROWS = 64  # of random blocks, repeated over a matrix, because random values take longer to make than to write


def write_model(folder: Path, name: str, type: str, blocks: int) -> Iterator[int]:
    """Write transformer, text encoder and autoencoder of a model into a folder. Yields the bytes of every tensor.

    Args:
        folder: Takes the files.
        name: A name in MODELS.
        type: The type of the matrices in the transformer's blocks; the encoder's are Q8_0.
        blocks: How many blocks the transformer has, and the encoder at most.
    """
    dims = MODELS[name]
    keys: dict[str, Any] = {"skyrun.task": name.split("-")[0], "general.type": "model"}
    shapes = WAN_TRANSFORMER.shapes("original", {**dims["transformer"], "layers": blocks})
    yield from _write_gguf(folder / f"transformer-{type}.gguf", "wan", shapes, "blocks.", type, keys)
    layers = min(blocks, TEXT_LAYERS)
    shapes = UMT5_ENCODER.shapes("gguf", {**dims["text_encoder"], "layers": layers})
    keys = {"t5encoder.block_count": layers, "tokenizer.huggingface.json": ascii_tokenizer().to_str()}
    yield from _write_gguf(folder / "text-encoder.gguf", "t5encoder", shapes, "enc.blk.", "Q8_0", keys)
    vae = {name: _random(shape) for name, shape in WAN_VAE.shapes("original", dims["vae"]).items()}
    save_file(vae, folder / "vae.safetensors")
    yield sum(tensor.nbytes for tensor in vae.values())


def model_bytes(name: str, type: str, blocks: int) -> int:
    """Estimate how many bytes `write_model` writes.

    Args:
        name: A name in MODELS.
        type: The type of the matrices in the transformer's blocks.
        blocks: How many blocks the transformer has.
    """
    dims, layers = MODELS[name], min(blocks, TEXT_LAYERS)
    parts = (
        (WAN_TRANSFORMER.shapes("original", {**dims["transformer"], "layers": blocks}), "blocks.", type),
        (UMT5_ENCODER.shapes("gguf", {**dims["text_encoder"], "layers": layers}), "enc.blk.", "Q8_0"),
        (WAN_VAE.shapes("original", dims["vae"]), "none", "F32"),
    )
    return sum(
        _nbytes(_type_of(name, shape, prefix, kind), shape)
        for shapes, prefix, kind in parts
        for name, shape in shapes.items()
    )


def _type_of(name: str, shape: Shape, prefix: str, type: str) -> str:
    """The type of a tensor: matrices of blocks and the embedding table are quantized, everything else is float32."""
    if name == "token_embd.weight":
        return "Q8_0"
    return type if name.startswith(prefix) and len(shape) == 2 and not name.endswith("rel_b.weight") else "F32"


def _nbytes(type: str, shape: Shape) -> int:
    return prod(shape[:-1]) * FORMATS[type].row_bytes(shape[-1])


def _write_gguf(
    path: Path,
    architecture: str,
    shapes: Mapping[str, Shape],
    prefix: str,
    type: str,
    keys: Mapping[str, Any],
) -> Iterator[int]:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key, value)
    types = {name: _type_of(name, shape, prefix, type) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType[types[name]]
        stored = (*shape[:-1], FORMATS[types[name]].row_bytes(shape[-1]))
        dtype = np.dtype(np.float32 if types[name] == "F32" else np.uint8)
        dims = shape if types[name] == "F32" else stored
        writer.add_tensor_info(name, dims, dtype, _nbytes(types[name], shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        writer.write_tensor_data(_data(types[name], shape))
        yield _nbytes(types[name], shape)
    writer.close()


def _data(type: str, shape: Shape) -> "np.ndarray[Any, Any]":
    if type == "F32":
        return _random(shape).numpy()
    rows = min(_PATTERN_ROWS, shape[0])
    pattern = random_blocks(type, rows, shape[-1]).numpy()
    return np.resize(pattern, (shape[0], pattern.shape[1]))


def _random(shape: Shape) -> Tensor:
    """Random values, scaled so that activations keep about their magnitude."""
    fan_in = prod(shape[1:])
    return torch.randn(shape) / sqrt(fan_in)
