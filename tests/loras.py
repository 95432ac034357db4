"""Adapters for tests: random ones for a tiny transformer, written as the programs of this field write them."""

import json

import torch
from safetensors.torch import save_file

from skyrun.kernels.name_tables import WAN_TRANSFORMER
from skyrun.planning.published import published_shapes
from skyrun.tasks import TASKS


def layers(blocks):
    """Names of the linear layers in blocks, original and of diffusers."""
    pairs = {}
    for row in WAN_TRANSFORMER.rows:
        if row.name().endswith(".weight") and len(row.shape.split()) == 2 and "{n}" in row.name():
            for index in range(blocks):
                one = row.for_block(index)
                pairs[one.name().removesuffix(".weight")] = one.name(1).removesuffix(".weight")
    return pairs


def random_pairs(shapes, names, rank, seed=0, size=0.3):
    """{layer: (down, up)} of thin random matrices, whose product is about `size` of a usual weight."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        rows, cols = shapes[f"{name}.weight"]
        down = torch.randn(rank, cols, generator=generator) * cols**-0.5
        found[name] = down, torch.randn(rows, rank, generator=generator) * size * rank**-0.5
    return found


def write_adapter(path, pairs, style, alpha=None, diffusers=None, metadata=None, extra=None):
    """Write pairs of down and up as kohya, diffusers, peft, ComfyUI or lightx2v do."""
    tensors = {}
    for layer, (down, up) in pairs.items():
        if style == "kohya":
            name, ends = "lora_unet_" + layer.replace(".", "_"), ("lora_down", "lora_up")
        elif style == "diffusers":
            name, ends = f"transformer.{diffusers[layer]}", ("lora_A", "lora_B")
        elif style == "peft":
            name, ends = f"base_model.model.{layer}", ("lora_A.default", "lora_B.default")
        else:
            name, ends = (
                f"diffusion_model.{layer}",
                ("lora_down", "lora_up") if style == "lightx2v" else ("lora_A", "lora_B"),
            )
        tensors[f"{name}.{ends[0]}.weight"], tensors[f"{name}.{ends[1]}.weight"] = down, up
        if alpha is not None and style in ("kohya", "lightx2v"):
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    said = dict(metadata or {})
    if alpha is not None and style == "diffusers":
        settings = {"lora_alpha": alpha, "r": 4, "target_modules": sorted(diffusers[layer] for layer in pairs)}
        said["lora_adapter_metadata"] = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
    save_file({name: tensor.contiguous() for name, tensor in {**tensors, **(extra or {})}.items()}, path, said)
    return path


def published_adapter(path, task, rank=64):
    """An adapter for all linear layers in blocks of a published model. Its file is sparse: it holds zeros."""
    shapes, tensors, at = published_shapes(TASKS[task]), {}, 0
    for layer in layers(40):
        rows, cols = shapes[f"{layer}.weight"]
        for name, shape in (("lora_A", [rank, cols]), ("lora_B", [rows, rank])):
            entry = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * shape[0] * shape[1]]}
            tensors[f"diffusion_model.{layer}.{name}.weight"], at = entry, entry["data_offsets"][1]
    header = json.dumps(tensors).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    return path
