"""The files that make up a model: found in a folder by what they say of themselves, never by their names."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeVar

from skyrun.errors import BAD_INPUT, MODEL_MISSING, SkyrunError
from skyrun.kernels.formats import FORMATS
from skyrun.kernels.gguf_file import GGUFFile, open_gguf
from skyrun.kernels.safetensors_header import read_safetensors_header

T = TypeVar("T")

_CONVERT = "skyrun pull TASK, or skyrun convert CHECKPOINT -o DIR and then --model DIR"
_TELLING = {"vae": "decoder.conv1.weight", "audio encoder": "feature_projection.projection.weight"}
_IN_BLOCK = re.compile(r"\bbl(oc)?ks?\.\d+\.")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model. Encoders of pictures and of speech belong to the talking avatar only."""

    transformer: GGUFFile
    text_encoder: GGUFFile
    vae: Path
    image_encoder: GGUFFile | None = None
    audio_encoder: Path | None = None

    @property
    def parts(self) -> dict[str, Path]:
        """Where each file is, by what it is."""
        encoders = {
            "image encoder": self.image_encoder.path if self.image_encoder else None,
            "audio encoder": self.audio_encoder,
        }
        there = {"transformer": self.transformer.path, "text encoder": self.text_encoder.path, "autoencoder": self.vae}
        return there | {name: path for name, path in encoders.items() if path is not None}


def find_model(model: Path | None, task: str | None, quant: str | None = None) -> ModelFiles:
    """Look into a folder, or beside a transformer file. task: None takes a model for any.

    Of several transformers the one with the most bits is taken, unless `quant` names another. SkyrunError (exit code
    4) says which parts are missing.
    """
    if model is None:
        raise SkyrunError("no model was given", _CONVERT, MODEL_MISSING)
    if not model.exists():
        raise SkyrunError(f"the model {model} does not exist", _CONVERT, MODEL_MISSING)
    folder = model if model.is_dir() else model.parent
    unreadable: list[str] = []
    headers = _readable(open_gguf, folder.glob("*.gguf"), unreadable)
    encoders = [header for header in headers if header.architecture == "t5encoder"]
    visions = [header for header in headers if header.architecture == "clip"]
    named = dict(reversed([found for found in _readable(_named, folder.glob("*.safetensors"), unreadable) if found]))
    transformers = [open_gguf(model)] if model.is_file() else [h for h in headers if h.architecture == "wan"]
    fitting = _for_task(transformers, task) if task and transformers else transformers
    parts = {"transformer": transformers, "text encoder": encoders, "autoencoder": named.get("vae")}
    if task == "a2v":
        parts |= {"image encoder": visions, "audio encoder": named.get("audio encoder")}
    missing = [f"{folder} has no {name}" for name, found in parts.items() if not found]
    if missing:
        code = BAD_INPUT if unreadable else MODEL_MISSING
        if (folder / "transformer").is_dir():
            missing.append(f"{folder} is a published checkpoint, which has to be converted first")
        raise SkyrunError.listing("the model is not complete", [*unreadable, *missing], _CONVERT, code)
    transformer = _select(fitting, quant)
    encoder = max(encoders, key=bits_per_weight)
    if task != "a2v":
        return ModelFiles(transformer, encoder, named["vae"])
    return ModelFiles(transformer, encoder, named["vae"], max(visions, key=bits_per_weight), named["audio encoder"])


def transformers_in(folder: Path, task: str) -> list[GGUFFile]:
    """Every transformer of a task in a folder, those that say no task among them; damaged files are left out."""
    headers = _readable(open_gguf, folder.glob("*.gguf"), [])
    found = [header for header in headers if header.architecture == "wan"]
    return [file for file in found if file.metadata.get("skyrun.task", task) == task]


def _readable(read: Callable[[Path], T], paths: Iterable[Path], unreadable: list[str]) -> list[T]:
    """What `read` makes of each path; one that it refuses matters only if something is missing in the end."""
    found = []
    for path in sorted(path for path in paths if path.is_file()):
        try:
            found.append(read(path))
        except SkyrunError as error:
            unreadable.append(error.message)
    return found


def _named(path: Path) -> tuple[str, Path] | None:
    """What a file of safetensors is, if it is known."""
    tensors = read_safetensors_header(path).tensors
    return next(((name, path) for name, tensor in _TELLING.items() if tensor in tensors), None)


def _for_task(transformers: list[GGUFFile], task: str) -> list[GGUFFile]:
    fitting = [file for file in transformers if file.metadata.get("skyrun.task", task) == task]
    if not fitting:
        other = transformers[0]
        said = other.metadata["skyrun.task"]
        raise SkyrunError(f"{other.path} is a model for {said}, not for {task}", f"use it with `skyrun run {said}`")
    return fitting


def _select(transformers: list[GGUFFile], quant: str | None) -> GGUFFile:
    if quant is None:
        return max(transformers, key=bits_per_weight)
    by_recipe = {str(file.metadata.get("skyrun.quant", main_type(file))): file for file in transformers}
    there = {main_type(file): file for file in transformers} | by_recipe
    if quant.upper() not in there:
        folder = transformers[0].path.parent
        raise SkyrunError(f"{folder} has no {quant} transformer", f"it has {', '.join(by_recipe)}", MODEL_MISSING)
    return there[quant.upper()]


def _block_weights(file: GGUFFile) -> dict[str, int]:
    """How many weights of a file's blocks have each type."""
    weights = dict.fromkeys(FORMATS, 0)
    for info in file.tensors.values():
        if _IN_BLOCK.search(info.name):
            weights[info.format.name] += prod(info.shape)
    return weights


def main_type(file: GGUFFile) -> str:
    """The type that most weights of a file's blocks have."""
    weights = _block_weights(file)
    return max(weights, key=lambda name: weights[name])


def bits_per_weight(file: GGUFFile) -> float:
    """Bits per weight of a file's blocks, on average."""
    weights = _block_weights(file)
    return sum(count * FORMATS[name].bits_per_weight for name, count in weights.items()) / max(1, sum(weights.values()))
