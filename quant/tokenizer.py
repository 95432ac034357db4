"""The tokenizer that belongs to a text encoder: a tokenizer.json beside it, or one inside its GGUF file."""

from pathlib import Path

from tokenizers import Tokenizer

from skyrun.kernels.errors import SkyrunError
from skyrun.quant.checkpoint import Part, folders

_FILE = "tokenizer.json"
_INSIDE = "tokenizer.huggingface.json"
_PLACES = (".", "tokenizer", "google/umt5-xxl")


def find_tokenizer(source: Path, part: Part) -> str:
    """The text of a tokenizer.json. SkyrunError if there is none, or one that cannot be used."""
    if part.gguf and isinstance(inside := part.gguf.metadata.get(_INSIDE), str):
        return _checked(inside, f"the tokenizer in {part.label}")
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
