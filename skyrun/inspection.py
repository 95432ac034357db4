"""What is in a file: its own words about itself, and what its tensors add up to. Reads headers only."""

from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.kernels.gguf_file import open_gguf
from skyrun.kernels.safetensors_header import read_safetensors_header

_VIDEO = (".mp4", ".mkv", ".mov", ".webm")


def describe(path: Path) -> dict[str, Any]:
    """kind, bytes, and by kind: metadata and types of tensors, or the request that a clip was made from."""
    if not path.exists():
        raise SkyrunError(f"{path} does not exist", "check the path", MODEL_MISSING)
    if path.is_dir():
        raise SkyrunError(f"{path} is a folder", "give one of the files in it")
    head: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size}
    suffix = path.suffix.lower()
    if suffix in _VIDEO:
        from skyrun.video import read_request

        return head | {"kind": "video", "made_from": read_request(path) or {"request": "none in the file"}}
    if suffix == ".safetensors":
        return head | _describe_safetensors(path)
    if suffix != ".gguf" and not _starts_like_gguf(path):
        raise SkyrunError(
            f"{path} is no kind of file that skyrun knows", "it describes GGUF, safetensors and video files"
        )
    return head | _describe_gguf(path)


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
    tensors = [(name, tensor.shape, tensor.dtype, tensor.nbytes) for name, tensor in header.tensors.items()]
    return {"kind": "safetensors", "metadata": header.metadata} | _totals(tensors)


def _totals(tensors: list[tuple[str, tuple[int, ...], str, int]]) -> dict[str, Any]:
    types: dict[str, dict[str, Any]] = defaultdict(lambda: {"tensors": 0, "weights": 0, "bytes": 0})
    for _, shape, type, nbytes in tensors:
        types[type]["tensors"] += 1
        types[type]["weights"] += prod(shape)
        types[type]["bytes"] += nbytes
    return {"types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"]))}
