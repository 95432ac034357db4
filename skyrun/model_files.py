"""The files that make up a model: found in a folder by what they say of themselves, never by their names."""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.gguf_file import GGUFFile, open_gguf
from skyrun.kernels.formats import FORMATS

_CONVERT = "skyrun convert CHECKPOINT -o DIR, then --model DIR"
_VAE_TENSOR = "decoder.conv1.weight"
_IN_BLOCK = re.compile(r"\bbl(oc)?ks?\.\d+\.")
_MAX_HEADER = 100 << 20  # the limit of the safetensors format


@dataclass(frozen=True)
class ModelFiles:
    """The three files of a reference-to-video model."""

    transformer: GGUFFile
    text_encoder: GGUFFile
    vae: Path


def find_model(model: Path | None, task: str, quant: str | None = None) -> ModelFiles:
    """Look into a folder, or beside a transformer file.

    Of several transformers the one with the most bits is taken, unless `quant` names another. SkyrunError (exit code
    4) says which parts are missing.
    """
    if model is None:
        raise SkyrunError("no model was given", _CONVERT, MODEL_MISSING)
    if not model.exists():
        raise SkyrunError(f"the model {model} does not exist", _CONVERT, MODEL_MISSING)
    folder = model if model.is_dir() else model.parent
    headers = [open_gguf(path) for path in sorted(folder.glob("*.gguf"))]
    if model.is_file():
        transformers = [open_gguf(model)]
    else:
        transformers = [header for header in headers if header.architecture == "wan"]
    encoders = [header for header in headers if header.architecture == "t5encoder"]
    vaes = [path for path in sorted(folder.glob("*.safetensors")) if _VAE_TENSOR in safetensors_header(path)]
    parts = {"a transformer": transformers, "a text encoder": encoders, "an autoencoder": vaes}
    missing = [f"{folder} has no {name.split(' ', 1)[1]}" for name, found in parts.items() if not found]
    if missing:
        if (folder / "transformer").is_dir():
            missing.append(f"{folder} is a published checkpoint, which has to be converted first")
        raise SkyrunError.listing("the model is not complete", missing, _CONVERT, MODEL_MISSING)
    return ModelFiles(_for_task(_select(transformers, quant), task), max(encoders, key=bits_per_weight), vaes[0])


def _select(transformers: list[GGUFFile], quant: str | None) -> GGUFFile:
    if quant is not None:
        there = {main_type(header): header for header in transformers}
        if quant not in there:
            folder = transformers[0].path.parent
            raise SkyrunError(f"{folder} has no {quant} transformer", f"it has {', '.join(there)}", MODEL_MISSING)
        return there[quant]
    return max(transformers, key=bits_per_weight)


def _for_task(transformer: GGUFFile, task: str) -> GGUFFile:
    said = transformer.metadata.get("skyrun.task", task)
    if said != task:
        raise SkyrunError(
            f"{transformer.path} is a model for {said}, not for {task}", f"use it with `skyrun run {said}`"
        )
    return transformer


def main_type(file: GGUFFile) -> str:
    """The type that most weights of a file's blocks have."""
    weights = dict.fromkeys(FORMATS, 0)
    for info in file.tensors.values():
        if _IN_BLOCK.search(info.name):
            weights[info.format.name] += prod(info.shape)
    return max(weights, key=lambda name: weights[name])


def bits_per_weight(file: GGUFFile) -> float:
    """Bits per weight of that type."""
    return FORMATS[main_type(file)].bits_per_weight


def safetensors_header(path: Path) -> dict[str, object]:
    """The header of a safetensors file: tensors by name and `__metadata__`.

    SkyrunError if it is none, or if it is shorter than its header says.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
        end = 8 + length + max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
        if end > size:
            raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SkyrunError(
            f"{path} is not a usable safetensors file: {error}", "convert or download it again"
        ) from error
    return header
