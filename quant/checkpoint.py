"""A published checkpoint on disk: which components it has, and the tensors of each, read piece by piece."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skyrun.kernels.errors import MODEL_MISSING, SkyrunError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a safetensors file, not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    def rows(self, at_most: int) -> Iterator[Tensor]:
        """The tensor in float32 as [rows, cols] pieces of at most `at_most` weights (at least one row).

        The file is opened anew for each piece: a mapping that stays open keeps every page it touched in memory.
        """
        if len(self.shape) != 2 or self.numel <= at_most:
            with _opened(self.file) as source:
                whole = source.get_tensor(self.name).float()
            yield whole.reshape(-1, self.shape[-1]) if whole.dim() > 1 else whole.reshape(1, -1)
            return
        step = max(1, at_most // self.shape[1])
        for start in range(0, self.shape[0], step):
            with _opened(self.file) as source:
                yield source.get_slice(self.name)[start : start + step].float()


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise SkyrunError(f"cannot read {path}: {error}", "download the file again: it is cut or damaged") from error


@dataclass(frozen=True)
class Component:
    """One folder of a checkpoint: its tensors by name and its config.json."""

    folder: Path
    tensors: dict[str, SourceTensor]
    config: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds; an absent part is None."""

    folder: Path
    transformer: Component | None
    text_encoder: Component | None
    vae: Component | None
    tokenizer: Path | None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Look into a folder of the published R2V layout. SkyrunError if it holds none of its parts."""
    if not folder.exists():
        raise SkyrunError(f"{folder} does not exist", "give the folder of a downloaded checkpoint", MODEL_MISSING)
    if not folder.is_dir():
        raise SkyrunError(
            f"{folder} is a file, expected a checkpoint folder", "give the folder that holds transformer/"
        )
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    transformer, text_encoder, vae = (_component(folder / name) for name in ("transformer", "text_encoder", "vae"))
    checkpoint = Checkpoint(folder, transformer, text_encoder, vae, tokenizer if tokenizer.is_file() else None)
    if not (checkpoint.transformer or checkpoint.text_encoder or checkpoint.vae):
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise SkyrunError(
            f"{folder} is not a SkyReels-V3 R2V checkpoint: it holds {inside}",
            "expected the folders transformer/, text_encoder/, tokenizer/ and vae/",
        )
    return checkpoint


def _component(folder: Path) -> Component | None:
    if not folder.is_dir():
        return None
    files = _weight_files(folder)
    if not files:
        raise SkyrunError(f"{folder} holds no .safetensors file", "download the checkpoint again")
    tensors: dict[str, SourceTensor] = {}
    problems = []
    for file in files:
        for tensor in _tensors(file):
            if tensor.name in tensors:
                problems.append(f"{tensor.name} is in both {tensors[tensor.name].file.name} and {file.name}")
            if tensor.dtype not in _DTYPES:
                problems.append(f"{tensor.name} in {file.name} is {tensor.dtype}, expected {', '.join(_DTYPES)}")
            tensors[tensor.name] = tensor
    if problems:
        raise SkyrunError.listing(f"cannot use {folder}", problems)
    return Component(folder, tensors, _read_json(folder / "config.json"))


def _weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, or every safetensors file when there is no index."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        return sorted(folder.glob("*.safetensors"))
    weight_map = _read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SkyrunError(f"{indexes[0]} has no weight_map of tensors to files", "download it again")
    shards = sorted({folder / str(name) for name in weight_map.values()})
    missing = [f"{shard} is missing" for shard in shards if not shard.is_file()]
    if missing:
        raise SkyrunError.listing(f"{indexes[0].name} names shards that are not there", missing, "download them again")
    return shards


def _tensors(file: Path) -> list[SourceTensor]:
    with _opened(file) as source:
        slices = {name: source.get_slice(name) for name in source.keys()}  # noqa: SIM118 - not a dict
        return [SourceTensor(n, tuple(s.get_shape()), s.get_dtype(), file) for n, s in slices.items()]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SkyrunError(f"{path} is not JSON: {error}", "download it again") from error
    if not isinstance(content, dict):
        raise SkyrunError(f"{path} holds a {type(content).__name__}, expected an object", "download it again")
    return content
