"""The tokenizer that belongs to a text encoder: a tokenizer.json beside it, or one inside its GGUF file."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.gguf_file import GGUFFile
from skyrun.quant.checkpoint import Part, folders

_FILE = "tokenizer.json"
_INSIDE = "tokenizer.huggingface.json"
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type
_SPACE = "\u2581"  # what SentencePiece writes for a space
_PLACES = (".", "tokenizer", "google/umt5-xxl")


def find_tokenizer(source: Path, part: Part) -> str:
    """The text of a tokenizer.json. SkyrunError if there is none, or one that cannot be used."""
    if part.gguf and isinstance(inside := part.gguf.metadata.get(_INSIDE), str):
        return _checked(inside, f"the tokenizer in {part.label}")
    if part.gguf and "tokenizer.ggml.tokens" in part.gguf.arrays:
        return _from_arrays(part.gguf)
    path = _beside(source, part.folder)
    if path is None:
        raise SkyrunError(
            f"{part.label} is a text encoder, and there is no {_FILE} near it",
            "download the folder tokenizer/ or google/umt5-xxl/ too",
        )
    try:
        return _checked(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SkyrunError(f"cannot read {path}: {error}", "download it again") from error


def _beside(source: Path, folder: Path) -> Path | None:
    around = [base / place for base in (folder, folder.parent) for place in _PLACES]
    around += folders(source) if source.is_dir() else []
    return next((place / _FILE for place in around if (place / _FILE).is_file()), None)


def _checked(text: str, where: str) -> str:
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise SkyrunError(f"{where} is not a tokenizer: {error}", "download it again") from error
    return text


def _from_arrays(file: GGUFFile) -> str:
    """The tokenizer that other programs keep in GGUF arrays, as a tokenizer.json: SentencePiece's unigram model."""
    try:
        return _unigram(file).to_str()
    except SkyrunError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise SkyrunError(f"the tokenizer in {file.path} is damaged: {error}", "download it again") from error


def _unigram(file: GGUFFile) -> Tokenizer:
    kind = file.metadata.get("tokenizer.ggml.model")
    tokens, scores, types = (file.array(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    if kind != "t5" or not len(tokens) == len(scores) == len(types):
        raise SkyrunError(
            f"the tokenizer in {file.path} is a {kind!r} of {len(tokens)} tokens, {len(scores)} scores and "
            f"{len(types)} types, expected 't5' with as many of each",
            f"put the {_FILE} of google/umt5-xxl beside it",
        )
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", types.index(_UNKNOWN) if _UNKNOWN in types else None)
    end = tokens[file.metadata.get("tokenizer.ggml.eos_token_id", 1)]
    pieces = list(zip(tokens, scores, strict=True))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=_BYTE in types))
    charsmap = bytes(value & 0xFF for value in file.array("tokenizer.ggml.precompiled_charsmap"))
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if file.metadata.get("tokenizer.ggml.remove_extra_whitespaces", True):
        steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), _SPACE)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    prefixed = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefixed else "never")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokens.index(end))]
    )
    special = (_UNKNOWN, _CONTROL, _USER_DEFINED)
    tokenizer.add_special_tokens([token for token, type in zip(tokens, types, strict=True) if type in special])
    return tokenizer
