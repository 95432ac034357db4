"""Summarise a file's metadata and tensors. Reads headers only."""

import re
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.kernels.files.adapter import described, read_adapter
from skyrun.kernels.files.adapter_names import entry_of, other_kind
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.kernels.files.safetensors_header import read_safetensors_header

_TRANSFORMER = "wan"  # its architecture in GGUF
_VIDEO = (".mp4", ".mkv", ".mov", ".webm")
# The role of a tensor by its name; the first pattern that matches counts.
_ROLES = (
    ("self-attention", re.compile(r"\.(self_attn|attn1|SelfAttention)\.|\.attn_(q|k|v|o|out|qkv)\.|\.attention\.")),
    ("cross-attention", re.compile(r"\.(cross_attn|attn2)\.")),
    ("audio attention", re.compile(r"\.audio_cross_attn\.")),
    ("feed-forward", re.compile(r"\.(ffn|DenseReluDense|feed_forward)\.|\.ffn_(gate|up|down)\.")),
    ("embeddings", re.compile(r"embed|token_embd|img_emb|audio_proj|time_proj|class_embd|position_embd")),
    ("head", re.compile(r"^(.*\.)?(head|proj_out)\.")),
)


def describe(path: Path) -> dict[str, Any]:
    """Kind and bytes of a file, then metadata and types of tensors, or the request that a clip was made from."""
    if not path.exists():
        raise SkyrunError(f"{path} does not exist", "check the path", MODEL_MISSING)
    if path.is_dir():
        raise SkyrunError(f"{path} is a folder", "give one of the files in it")
    head: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size}
    suffix = path.suffix.lower()
    if suffix in _VIDEO:
        from skyrun.media.video_writer import read_measured, read_request

        said = {"made_from": read_request(path) or {"request": "none in the file"}}
        attention = read_measured(path)
        return head | {"kind": "video"} | said | ({"attention": attention} if attention else {})
    if suffix == ".partial":
        raise SkyrunError(f"{path} is an unfinished file", "run the conversion that began it again")
    if suffix == ".safetensors":
        return head | _describe_safetensors(path)
    if suffix != ".gguf" and not _starts_like_gguf(path):
        raise SkyrunError(
            f"{path} is not a kind of file that skyrun knows", "it describes GGUF, safetensors and video files"
        )
    return head | _describe_gguf(path)


def described_file(path: Path) -> Path:
    """The file to describe: of the folder of a model its transformer, anything else itself."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    return next((file for file in files if open_gguf(file).architecture == _TRANSFORMER), path)


def _starts_like_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise SkyrunError(f"cannot read {path}: {error}", "check its permissions") from error


def _describe_gguf(path: Path) -> dict[str, Any]:
    file = open_gguf(path)
    tensors = [(info.name, info.shape, info.format.name, info.nbytes) for info in file.tensors.values()]
    return {"kind": f"GGUF, {file.architecture or 'no architecture'}", "metadata": file.metadata} | _totals(tensors)


def _describe_safetensors(path: Path) -> dict[str, Any]:
    header = read_safetensors_header(path)
    if any(entry_of(name) or other_kind(name) for name in header.tensors):
        adapter = read_adapter(path)
        return {"kind": "an adapter (LoRA)", "metadata": adapter.metadata, "adapter": described(adapter)}
    tensors = [(name, tensor.shape, tensor.dtype, tensor.nbytes) for name, tensor in header.tensors.items()]
    return {"kind": "safetensors", "metadata": header.metadata} | _totals(tensors)


def _role(name: str, shape: tuple[int, ...]) -> str:
    if sum(side > 1 for side in shape) < 2 or "modulation" in name or "scale_shift_table" in name:
        return "norms, biases, modulation"
    return next((role for role, pattern in _ROLES if pattern.search(name)), "other")


def _totals(tensors: list[tuple[str, tuple[int, ...], str, int]]) -> dict[str, Any]:
    types, roles = _Totals(), _Totals()
    for name, shape, type, nbytes in tensors:
        types.add(type, shape, nbytes)
        roles.add(_role(name, shape), shape, nbytes)
    return {"types": types.by_size(), "roles": roles.by_size()}


class _Totals:
    """Sums of tensors, weights and bytes by key."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "weights": 0, "bytes": 0})

    def add(self, key: str, shape: tuple[int, ...], nbytes: int) -> None:
        sums = self._sums[key]
        sums["tensors"] += 1
        sums["weights"] += prod(shape)
        sums["bytes"] += nbytes

    def by_size(self) -> dict[str, dict[str, int]]:
        return dict(sorted(self._sums.items(), key=lambda item: -item[1]["bytes"]))
