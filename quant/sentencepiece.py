"""SentencePiece unigram models: out of their own files or out of GGUF arrays, and into a tokenizer.json."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from skyrun.kernels.gguf_file import GGUFFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # types of pieces
_UNIGRAM = 1
_SPACE = "\u2581"  # what SentencePiece writes for a space


@dataclass(frozen=True)
class Unigram:
    """A model's pieces with their log probabilities and types, and how text is prepared for it."""

    pieces: list[tuple[str, float]]
    types: list[int]
    charsmap: bytes
    end: int
    prefix_space: bool
    squeeze_spaces: bool

    def tokenizer_json(self) -> str:
        """The same model as text that the tokenizers library reads. Whatever the library raises if it cannot be."""
        unknown = self.types.index(_UNKNOWN)
        tokenizer = Tokenizer(models.Unigram(self.pieces, unk_id=unknown, byte_fallback=_BYTE in self.types))
        steps: list[Any] = [normalizers.Precompiled(self.charsmap)] if self.charsmap else []
        if self.squeeze_spaces:
            steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), _SPACE)]
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if self.prefix_space else "never")
        end = self.pieces[self.end][0]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, self.end)])
        special = (_UNKNOWN, _CONTROL, _USER_DEFINED)
        names = [piece for (piece, _), type in zip(self.pieces, self.types, strict=True) if type in special]
        tokenizer.add_special_tokens(names)
        text: str = tokenizer.to_str()
        return text


def from_gguf(file: GGUFFile) -> Unigram:
    """The model that llama.cpp's converter keeps in arrays. ValueError if they are not such a model."""
    said = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "eos_token_id")}
    tokens, scores, types = (file.array(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    if said["model"] != "t5" or not len(tokens) == len(scores) == len(types):
        counts = f"{len(tokens)} tokens, {len(scores)} scores, {len(types)} types"
        raise ValueError(f"a tokenizer {said['model']!r} of {counts}, expected 't5' with as many of each")
    end = said["eos_token_id"]
    return Unigram(
        pieces=list(zip(tokens, scores, strict=True)),
        types=types,
        charsmap=bytes(value & 0xFF for value in file.array("tokenizer.ggml.precompiled_charsmap")),
        end=end if isinstance(end, int) else tokens.index("</s>"),
        prefix_space=bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True)),
        squeeze_spaces=bool(file.metadata.get("tokenizer.ggml.remove_extra_whitespaces", True)),
    )


def parse(data: bytes) -> Unigram:
    """A spiece.model: protocol buffers, of which four messages matter. ValueError if it is something else."""
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
    """Numbers and values of a message's fields: integers, or bytes."""
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
