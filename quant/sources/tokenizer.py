"""Find the tokenizer of a text encoder inside its file or beside it, and convert it to the text of a tokenizer.json."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.ggml_tokenizer import JSON_KEY, from_gguf, from_json, guarded, has_tokenizer, load_tokenizer
from skyrun.kernels.files.reading import open_unbuffered, read_into
from skyrun.quant.sources import sentencepiece
from skyrun.quant.sources.checkpoint import Part, folders

_JSON, _SENTENCEPIECE = "tokenizer.json", "spiece.model"
_TENSOR = "spiece_model"  # ComfyUI stores the bytes of a spiece.model as a tensor
_HINT = "download it again"
_PLACES = (".", "tokenizer", "google/umt5-xxl")


def tokenizer_keys(source: Path, part: Part, rows: int) -> dict[str, Any]:
    """The tokenizer's metadata for a text encoder's file: its JSON, and the arrays that other programs read.

    Args:
        source: the checkpoint.
        part: the text encoder.
        rows: how many rows its embedding has.

    Raises SkyrunError if there is no tokenizer, or if it cannot be used.
    """
    where, read = _place(source, part, rows)
    with guarded(where, _HINT):
        text = read()
    load_tokenizer(where, text, rows, _HINT)
    model = from_json(text)
    return {JSON_KEY: text} | (model.metadata(rows) if model else {})


def _place(source: Path, part: Part, rows: int) -> tuple[str, Callable[[], str]]:
    """How messages name the tokenizer, and a function that reads it as JSON. Other formats are converted to JSON."""
    gguf = part.gguf
    if gguf and has_tokenizer(gguf):
        inside = gguf.metadata.get(JSON_KEY)
        if isinstance(inside, str):
            return f"the tokenizer in {part.label}", lambda: inside
        return f"the tokenizer in {part.label}", lambda: from_gguf(gguf, rows).tokenizer_json()
    if beside := _beside(source, part.folder, _JSON):
        return str(beside), partial(beside.read_text, encoding="utf-8")
    if tensor := next((name for name in part.tensors if name.split(".")[-1] == _TENSOR), None):
        return f"{tensor} in {part.label}", lambda: sentencepiece.parse(_bytes_of(part, tensor)).tokenizer_json()
    if model := _beside(source, part.folder, _SENTENCEPIECE):
        return str(model), lambda: sentencepiece.parse(model.read_bytes()).tokenizer_json()
    raise SkyrunError(
        f"{part.label} is a text encoder, and there is no {_JSON} near it",
        "download the folder tokenizer/ or google/umt5-xxl/ too",
    )


def _beside(source: Path, folder: Path, name: str) -> Path | None:
    around = [base / place for base in (folder, folder.parent) for place in _PLACES]
    around += folders(source) if source.is_dir() else []
    return next((place / name for place in around if (place / name).is_file()), None)


def _bytes_of(part: Part, name: str) -> bytes:
    tensor = part.tensors[name]
    if tensor.dtype not in ("U8", "I8"):
        raise ValueError(f"bytes as {tensor.dtype}")
    data = bytearray(tensor.numel)
    with open_unbuffered(tensor.file) as file:
        read_into(file, memoryview(data), tensor.offset)
    return bytes(data)
