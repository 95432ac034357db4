"""Read SentencePiece unigram models from their own files."""

import struct
from collections.abc import Iterator
from typing import Any

from skyrun.kernels.files.ggml_tokenizer import Unigram

_NORMAL, _UNIGRAM = 1, 1  # the default types of a piece and of a model, which files leave out


def parse(data: bytes) -> Unigram:
    """Parse a spiece.model, a protocol buffer of which four messages matter. Raises ValueError for anything else."""
    pieces, types = [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
            types.append(piece.get(3, _NORMAL))
        elif field in (2, 3):
            (trainer if field == 2 else normalizer).update(_fields(value))
    if not pieces or trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise ValueError(f"{len(pieces)} pieces of a model of kind {trainer.get(3)}, expected a unigram model")
    names = [piece for piece, _ in pieces]
    return Unigram(
        pieces=pieces,
        types=types,
        charsmap=normalizer.get(2, b""),
        end=names.index("</s>"),
        prefix_space=bool(normalizer.get(3, True)),
        squeeze_spaces=bool(normalizer.get(4, True)),
    )


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """The (number, value) of each field in a message; values are integers or bytes."""
    if not isinstance(data, bytes):
        raise ValueError("a number where a message was expected")
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value: Any
            value, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(key & 7)
            if key & 7 == 2:
                size, at = _varint(data, at)
            if size is None or at + size > len(data):
                raise ValueError(f"a field that ends beyond {len(data)} bytes, or of kind {key & 7}")
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if at >= len(data):
            break
        byte = data[at]
        value, at = value | (byte & 0x7F) << 7 * place, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number without an end")
