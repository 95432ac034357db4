"""Recognise model files that have not changed, by digests of their headers and of the first bytes of tensors."""

import hashlib
import json
import os
from pathlib import Path

from skyrun.kernels.files.gguf_file import GGUFFile
from skyrun.kernels.files.reading import open_unbuffered, read_into
from skyrun.kernels.files.safetensors_header import read_safetensors_header
from skyrun.models.folder import ModelFiles

_HEAD_BYTES = 256  # of every tensor that go into the fingerprint of a file


def fingerprint(file: GGUFFile) -> str:
    """A digest of a file's tensors: their names, types, shapes and first bytes."""
    digest = hashlib.sha256()
    for info in file.tensors.values():
        digest.update(f"{info.name} {info.format.name} {info.shape}".encode())
        digest.update(file.read(info, 0, min(info.nbytes, _HEAD_BYTES)))
    return digest.hexdigest()[:16]


def adapter_fingerprint(path: Path) -> str:
    """A digest of an adapter's tensors and settings: it is another one when the file is replaced by another adapter.

    Raises SkyrunError if it is no safetensors file.
    """
    header = read_safetensors_header(path)
    digest = hashlib.sha256(json.dumps(sorted(header.metadata.items())).encode())
    with open_unbuffered(path) as file:
        for name, tensor in sorted(header.tensors.items()):
            head = bytearray(min(tensor.nbytes, _HEAD_BYTES))
            read_into(file, memoryview(head), tensor.offset)
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode() + head)
    return digest.hexdigest()[:16]


def identity(path: Path, header_bytes: int) -> str:
    """A digest of a file's header, size and modification time. It does not depend on where the file is."""
    header = bytearray(header_bytes)
    with open_unbuffered(path) as file:
        status = os.fstat(file.fileno())
        read_into(file, memoryview(header), 0)
    return hashlib.sha256(header + f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:32]


def gguf_identity(file: GGUFFile) -> str:
    """The identity of a GGUF file."""
    return identity(file.path, min(info.offset for info in file.tensors.values()))


def model_identity(files: ModelFiles) -> str:
    """The identities of a model's files, in the order of its parts."""
    ggufs = {file.path: file for file in (files.transformer, files.text_encoder, files.image_encoder) if file}
    return " ".join(
        gguf_identity(ggufs[path]) if path in ggufs else _safetensors_identity(path) for path in files.parts.values()
    )


def _safetensors_identity(path: Path) -> str:
    return identity(path, min(tensor.offset for tensor in read_safetensors_header(path).tensors.values()))
