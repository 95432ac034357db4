"""Recognise by its first bytes a file that has a model's name but is not a model."""

from dataclasses import dataclass
from pathlib import Path

_HEAD = 512


@dataclass(frozen=True)
class FileKind:
    """A kind of file that people mistake for a model. what: a clause that says what it is. hint: what to do."""

    what: str
    hint: str


_LFS = FileKind(
    "it is a pointer of git-lfs, a few lines that stand for the file",
    "run `git lfs pull` in the repository, or download the file itself",
)
_PAGE = FileKind("it is a web page", "the link led to a page: use the link of the page's download button")
_PICKLE = FileKind(
    "it was not saved by torch 1.6 or newer",
    "get the model as .safetensors, or load and save it again with a newer torch",
)
_EMPTY = FileKind("it is empty", "download it again, or get the model as .safetensors")
_ZEROS = FileKind("it begins with zeros", "the download was not finished: download it again")
_KINDS = (
    (b"version https://git-lfs", _LFS),
    (b"<!doctype", _PAGE),
    (b"<html", _PAGE),
    (b"<?xml", _PAGE),
    (b"gguf", FileKind("it is a GGUF file", "rename it so that it ends in .gguf")),
    (b"pk\x03\x04", FileKind("it is a zip file", "rename it to .pth if torch saved it, unpack it otherwise")),
    (b"\x1f\x8b", FileKind("it is packed with gzip", "unpack it")),
    (b"7z\xbc\xaf\x27\x1c", FileKind("it is packed with 7-Zip", "unpack it")),
    (b"rar!", FileKind("it is packed with RAR", "unpack it")),
    (b"\x89hdf", FileKind("it is an HDF5 file", "get the model as .safetensors")),
    (b"\x80\x02", _PICKLE),
    (b"\x80\x03", _PICKLE),
    (b"\x80\x04", _PICKLE),
    (b"{", FileKind("it is JSON or text", "get the file of the weights, which has the size of a model")),
)


def kind_of(path: Path) -> FileKind | None:
    """The kind of a file, judged by its first bytes, if it is one that people mistake for a model; else None."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    if not head:
        return _EMPTY
    if not head.strip(b"\0"):
        return _ZEROS
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()  # white space before a page
    return next((kind for magic, kind in _KINDS if start.startswith(magic)), None)
