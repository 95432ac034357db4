"""Find the files of a model in a folder by their headers, never by their names. Each file is opened once."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeVar

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.kernels.files.adapter import Fitted
from skyrun.kernels.files.gguf_file import GGUFFile, open_gguf
from skyrun.kernels.files.safetensors_header import read_safetensors_header
from skyrun.kernels.formats import FORMATS
from skyrun.kernels.name_tables import role_of

T = TypeVar("T")

CONVERT = "skyrun pull TASK, or skyrun convert CHECKPOINT -o DIR and then --model DIR"
_ROLES = {"wan": "transformer", "t5encoder": "text encoder", "clip": "image encoder"}
_TELLING = {"decoder.conv1.weight": "autoencoder", "feature_projection.projection.weight": "audio encoder"}
_IN_BLOCK = re.compile(r"\bbl(oc)?ks?\.\d+\.")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, and the adapters that are added to it.

    Only the talking avatar has encoders for images and audio.
    """

    transformer: GGUFFile
    text_encoder: GGUFFile
    vae: Path
    image_encoder: GGUFFile | None = None
    audio_encoder: Path | None = None
    adapters: tuple[Fitted, ...] = ()

    @property
    def parts(self) -> dict[str, Path]:
        """The path of each file by its role."""
        encoders = {
            "image encoder": self.image_encoder.path if self.image_encoder else None,
            "audio encoder": self.audio_encoder,
        }
        always = {"transformer": self.transformer.path, "text encoder": self.text_encoder.path, "autoencoder": self.vae}
        adapters = {f"adapter {number}": adapter.path for number, adapter in enumerate(self.adapters, 1)}
        return always | {name: path for name, path in encoders.items() if path is not None} | adapters


@dataclass(frozen=True)
class ModelFolder:
    """The model files in a folder.

    ggufs: by role, those with the most bits first. safetensors: by role, in the order of their names. named: the
    transformer file if the user named one instead of a folder. unreadable: what is wrong with the other files.
    """

    path: Path
    ggufs: dict[str, tuple[GGUFFile, ...]]
    safetensors: dict[str, tuple[Path, ...]]
    named: GGUFFile | None = None
    unreadable: tuple[str, ...] = ()

    @property
    def transformers(self) -> tuple[GGUFFile, ...]:
        """The transformer that the user named, or else all that the folder has."""
        return (self.named,) if self.named is not None else self.ggufs.get("transformer", ())

    def has(self, role: str) -> bool:
        """Whether the folder has a file for a role."""
        return bool(self.transformers if role == "transformer" else self.ggufs.get(role) or self.safetensors.get(role))


def open_folder(model: Path | None) -> ModelFolder:
    """Read all headers in a folder, or in the folder of a transformer file. SkyrunError (code 4) if there is none."""
    if model is None:
        raise SkyrunError("no model was given", CONVERT, MODEL_MISSING)
    if not model.exists():
        raise SkyrunError(f"the model {model} does not exist", CONVERT, MODEL_MISSING)
    named = _open_whole(model) if model.is_file() else None
    folder = model.parent if named else model
    unreadable: list[str] = []
    ggufs: dict[str, list[GGUFFile]] = {}
    for file in _readable(_open_whole, folder.glob("*.gguf"), unreadable):
        if role := gguf_role(file):
            ggufs.setdefault(role, []).append(file)
        else:
            word = file.metadata.get("general.architecture")
            unreadable.append(f"{file.path} has the architecture {word!r} and tensors that skyrun does not know")
    safetensors: dict[str, list[Path]] = {}
    for path, role in _readable(_telling, folder.glob("*.safetensors"), unreadable):
        if role:
            safetensors.setdefault(role, []).append(path)
    return ModelFolder(
        folder,
        {role: tuple(sorted(files, key=bits_per_weight, reverse=True)) for role, files in ggufs.items()},
        {role: tuple(paths) for role, paths in safetensors.items()},
        named,
        tuple(unreadable),
    )


def gguf_role(file: GGUFFile) -> str:
    """What a file is of a model: by its architecture, or by its tensors where that is another program's word."""
    return _ROLES.get(file.architecture) or role_of(file.tensors).replace("_", " ")


def _open_whole(path: Path) -> GGUFFile:
    """Open a GGUF file. Raises SkyrunError if it is one part of a model that is split over several files."""
    file = open_gguf(path)
    number, count = file.part
    if count > 1:
        raise SkyrunError(
            f"{path} is part {number} of {count} of a split GGUF",
            "join them with skyrun convert PART-1 -o DIR, or with llama-gguf-split --merge",
        )
    return file


def _readable(read: Callable[[Path], T], paths: Iterable[Path], unreadable: list[str]) -> list[T]:
    """The results of `read` for the files that it can read. Its errors are added to `unreadable`, to be shown later."""
    found = []
    for path in sorted(paths):
        if path.is_symlink() and not path.exists():
            unreadable.append(f"{path} is a link to {path.readlink()}, which does not exist")
        elif path.is_file():
            try:
                found.append(read(path))
            except SkyrunError as error:
                unreadable.append(error.message)
    return found


def _telling(path: Path) -> tuple[Path, str]:
    """A safetensors file and its role; "" if it has none."""
    tensors = read_safetensors_header(path).tensors
    return path, next((role for name, role in _TELLING.items() if name in tensors), "")


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
    """The average bits per weight of a file's blocks."""
    weights = _block_weights(file)
    return sum(count * FORMATS[name].bits_per_weight for name, count in weights.items()) / max(1, sum(weights.values()))
