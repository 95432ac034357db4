"""Read the tokenizer in a text encoder file: JSON of the tokenizers library, or the arrays that ggml's programs store.

A SentencePiece unigram model consists of pieces with log probabilities and types; llama.cpp and ComfyUI-GGUF read it
from `tokenizer.ggml.*`. Files that skyrun writes have both; if there is JSON, it is used.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.gguf_file import GGUFFile

JSON_KEY, _GGML = "tokenizer.huggingface.json", "tokenizer.ggml."
_NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_CONTROLS = ("<pad>", "</s>", "<s>")  # other special tokens may occur literally in a text
_PAD_SCORE = -10000.0  # for rows of the embedding that have no piece
_SPACE = "\u2581"  # what SentencePiece writes for a space
_SAMPLE = "A cat, 猫, on the Sea: é ﬁ 🙂\t1/2  </s>"
_CONVERT = "convert the published checkpoint: skyrun convert puts the tokenizer in"


@dataclass(frozen=True)
class Unigram:
    """A unigram model: its pieces with log probabilities and types, and how text is normalised for it."""

    pieces: list[tuple[str, float]]
    types: list[int]
    charsmap: bytes
    end: int
    prefix_space: bool
    squeeze_spaces: bool

    def tokenizer(self) -> Tokenizer:
        """The same model in the tokenizers library. Passes on whatever the library raises for an unusable one."""
        _check_charsmap(self.charsmap)
        unknown = self.types.index(UNKNOWN)
        tokenizer = Tokenizer(models.Unigram(self.pieces, unk_id=unknown, byte_fallback=BYTE in self.types))
        steps: list[Any] = [normalizers.Precompiled(self.charsmap)] if self.charsmap else []
        if self.squeeze_spaces:
            steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), _SPACE)]
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if self.prefix_space else "never")
        end = self.pieces[self.end][0]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, self.end)])
        special = (UNKNOWN, CONTROL, USER_DEFINED)
        names = [piece for (piece, _), type in zip(self.pieces, self.types, strict=True) if type in special]
        tokenizer.add_special_tokens(names)
        return tokenizer

    def tokenizer_json(self) -> str:
        """The same model as the JSON that the tokenizers library reads."""
        text: str = self.tokenizer().to_str()
        return text

    def metadata(self, rows: int) -> dict[str, Any]:
        """The metadata that ggml's programs read, padded to one piece for each of the embedding's rows."""
        texts = [piece for piece, _ in self.pieces]
        fill = range(len(texts), rows)
        keys: dict[str, Any] = {
            "model": "t5",
            "pre": "default",
            "tokens": (*texts, *(f"[PAD{row}]" for row in fill)),
            "scores": (*(score for _, score in self.pieces), *(_PAD_SCORE for _ in fill)),
            "token_type": (*self.types, *(UNUSED for _ in fill)),
            "unknown_token_id": self.types.index(UNKNOWN),
            "eos_token_id": self.end,
            "padding_token_id": texts.index("<pad>") if "<pad>" in texts else 0,
            "add_space_prefix": self.prefix_space,
            "remove_extra_whitespaces": self.squeeze_spaces,
        }
        if self.charsmap:
            keys["precompiled_charsmap"] = self.charsmap
        return {f"{_GGML}{key}": value for key, value in keys.items()}


def has_tokenizer(file: GGUFFile) -> bool:
    """Whether a text encoder file contains a tokenizer of either kind."""
    return isinstance(file.metadata.get(JSON_KEY), str) or f"{_GGML}tokens" in file.arrays


def read_tokenizer(file: GGUFFile, rows: int) -> Tokenizer:
    """The tokenizer in a text encoder file whose embedding has `rows` rows.

    Raises SkyrunError if there is none, if it cannot be used, or if it belongs to another embedding.
    """
    if not has_tokenizer(file):
        raise SkyrunError(f"{file.path} has no tokenizer inside ({JSON_KEY} or {_GGML}tokens)", _CONVERT)
    text = file.metadata.get(JSON_KEY)
    where = f"the tokenizer in {file.path}"
    if isinstance(text, str):
        return load_tokenizer(where, text, rows)
    with guarded(where, _CONVERT):
        tokenizer = from_gguf(file, rows).tokenizer()
        tokenizer.encode(_SAMPLE)
    return tokenizer


def load_tokenizer(where: str, text: str, rows: int, hint: str = _CONVERT) -> Tokenizer:
    """Load a tokenizer from its JSON.

    Args:
        where: how the error names it.
        text: the JSON.
        rows: how many rows the embedding has.
        hint: what the error tells the user to do if the JSON is damaged.

    Raises SkyrunError if it is damaged or has more tokens than the embedding has rows.
    """
    with guarded(where, hint):
        json.loads(text, object_pairs_hook=_check_pairs)
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()  # a file may enable padding, but here every id counts as a token
        tokenizer.encode(_SAMPLE)
    _check_size(where, tokenizer.get_vocab_size(with_added_tokens=True), rows)
    return tokenizer


def _check_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a tokenizer's JSON."""
    for key, value in pairs:
        if key == "precompiled_charsmap" and isinstance(value, str):
            _check_charsmap(base64.b64decode(value))
    return dict(pairs)


def _check_charsmap(charsmap: bytes) -> None:
    """ValueError for a map that says it is larger than it is: for lack of that memory the library ends the process."""
    nbytes = int.from_bytes(charsmap[:4], "little")
    if charsmap and (len(charsmap) < 4 or nbytes % 4 or nbytes > len(charsmap) - 4):
        raise ValueError(f"a map of characters of {nbytes} bytes in {len(charsmap)}")


@contextmanager
def guarded(where: str, hint: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into a SkyrunError: Exceptions, and panics, which are BaseExceptions."""
    try:
        yield
    except (SkyrunError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SkyrunError(f"{where} is not a tokenizer that works: {reason}", hint) from error


def _check_size(where: str, tokens: int, rows: int, least: int = 0) -> None:
    if not least <= tokens <= rows:
        raise SkyrunError(
            f"{where} has {tokens} tokens, the embedding {rows} rows: they belong to different models",
            "take tokenizer and text encoder from one model, for example umt5-xxl",
        )


def from_gguf(file: GGUFFile, rows: int) -> Unigram:
    """The model that ggml's programs store in arrays, which their writers pad to the `rows` rows of the embedding.

    Raises ValueError if the arrays are not such a model, SkyrunError if they belong to another embedding.
    """
    _check_size(f"the tokenizer in {file.path}", file.arrays[f"{_GGML}tokens"].count, rows, least=-(-rows // 2))
    model, end = (file.metadata.get(f"{_GGML}{key}") for key in ("model", "eos_token_id"))
    tokens, scores, types = (file.array(f"{_GGML}{name}") for name in ("tokens", "scores", "token_type"))
    if model != "t5" or not len(tokens) == len(scores) == len(types):
        counts = f"{len(tokens)} tokens, {len(scores)} scores, {len(types)} types"
        raise ValueError(f"a tokenizer {model!r} of {counts}, expected 't5' with as many of each")
    used = max((place for place, type in enumerate(types) if type != UNUSED), default=-1) + 1  # padding follows
    return Unigram(
        pieces=list(zip(tokens[:used], scores[:used], strict=True)),
        types=types[:used],
        charsmap=bytes(value & 0xFF for value in file.array(f"{_GGML}precompiled_charsmap")),
        end=end if isinstance(end, int) else tokens.index("</s>"),
        prefix_space=bool(file.metadata.get(f"{_GGML}add_space_prefix", True)),
        squeeze_spaces=bool(file.metadata.get(f"{_GGML}remove_extra_whitespaces", True)),
    )


def from_json(text: str) -> Unigram | None:
    """The model in a tokenizer.json; None if it is not a SentencePiece unigram model."""
    try:
        parsed = json.loads(text)
        vocabulary, unknown = parsed["model"]["vocab"], parsed["model"]["unk_id"]
        if parsed["model"]["type"] != "Unigram" or not isinstance(unknown, int):
            return None
        pieces = [(str(piece), float(score)) for piece, score in vocabulary]
        added = {token["id"]: token["content"] for token in parsed["added_tokens"]}
        steps = _steps(parsed["normalizer"])
        spaces = [step for step in _steps(parsed["pre_tokenizer"]) if step["type"] == "Metaspace"]
        maps = [base64.b64decode(step["precompiled_charsmap"]) for step in steps if step["type"] == "Precompiled"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    for place in sorted(added):
        if place == len(pieces):
            pieces.append((added[place], 0.0))
    texts = [piece for piece, _ in pieces]
    if not 0 <= unknown < len(texts) or "</s>" not in texts or len(set(texts)) != len(texts):
        return None
    return Unigram(
        pieces=pieces,
        types=_types(texts, unknown, set(added.values())),
        charsmap=maps[0] if maps else b"",
        end=texts.index("</s>"),
        prefix_space=bool(spaces) and spaces[0].get("prepend_scheme", "always") != "never",
        squeeze_spaces=any(step["type"] == "Replace" and step.get("content") == _SPACE for step in steps),
    )


def _steps(parsed: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer: none, one, or several."""
    if not parsed:
        return []
    return list(parsed.get("normalizers") or parsed.get("pretokenizers") or [parsed])


def _types(texts: Sequence[str], unknown: int, added: set[str]) -> list[int]:
    bytes_of = set(_BYTES) if set(_BYTES) <= set(texts) else set()
    types = []
    for place, text in enumerate(texts):
        if place == unknown:
            types.append(UNKNOWN)
        elif text in _CONTROLS:
            types.append(CONTROL)
        elif text in added:
            types.append(USER_DEFINED)
        else:
            types.append(BYTE if text in bytes_of else _NORMAL)
    return types
