"""Lay out the two kinds of output files, GGUF and safetensors: their header, and the offset of each tensor."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from skyrun.kernels.errors import FAILED, SkyrunError

# A value of the metadata: a scalar, a text, or an array of one of these. Bytes stand for an array of uint8.
Value = str | int | float | bytes | tuple[str, ...] | tuple[int, ...] | tuple[float, ...]


class Entry(NamedTuple):
    """A tensor's entry in a header."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int


class Layout(NamedTuple):
    """A file's header and size. offsets: of each tensor, from the start of the file."""

    header: bytes
    offsets: tuple[int, ...]
    nbytes: int


_ALIGNMENT = 32


def _placed(header: bytes, entries: Sequence[Entry], alignment: int) -> Layout:
    offsets, at = [], len(header)
    for entry in entries:
        offsets.append(at)
        at += -(-entry.nbytes // alignment) * alignment
    return Layout(header, tuple(offsets), at)


def gguf_layout(architecture: str, metadata: Mapping[str, Value], entries: Sequence[Entry]) -> Layout:
    """Lay out a GGUF v3 file with tensors in the given order, each at a multiple of 32 bytes."""
    try:
        header = _gguf_header(architecture, metadata, entries)
    except OSError as error:
        place = tempfile.gettempdir()
        raise SkyrunError(
            f"cannot write to {place}: {error}", "free some space there, or set TMPDIR", FAILED
        ) from error
    return _placed(header + bytes(-len(header) % _ALIGNMENT), entries, _ALIGNMENT)


def _gguf_header(architecture: str, metadata: Mapping[str, Value], entries: Sequence[Entry]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:  # gguf's writer only writes to paths
        path = Path(folder) / "header"
        writer = GGUFWriter(path, architecture)
        for key, value in metadata.items():
            _add_value(writer, key, value)
        for entry in entries:
            # float32 tells gguf's writer that the shape counts weights, not bytes; the real type is `raw_dtype`
            kind = GGMLQuantizationType[entry.type]
            writer.add_tensor_info(entry.name, entry.shape or (1,), np.dtype(np.float32), entry.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()


def _add_value(writer: GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, (tuple, bytes)):
        writer.add_array(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def safetensors_layout(metadata: Mapping[str, str], entries: Sequence[Entry]) -> Layout:
    """Lay out a safetensors file. If wide types come first, every tensor lies at a multiple of its width.

    Format: https://huggingface.co/docs/safetensors, "Format".
    """
    listed: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for entry in entries:
        listed[entry.name] = {"dtype": entry.type, "shape": entry.shape, "data_offsets": [at, at + entry.nbytes]}
        at += entry.nbytes
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _placed(len(text).to_bytes(8, "little") + text, entries, 1)
