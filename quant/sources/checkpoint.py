"""Read what a folder holds: files of tensors, grouped into parts that belong together, and the configs beside them."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrun.kernels.errors import MODEL_MISSING, SkyrunError
from skyrun.kernels.files.disk import is_possible
from skyrun.kernels.files.gguf_file import GGUFFile, open_gguf
from skyrun.kernels.files.names import brief
from skyrun.kernels.files.safetensors_header import own_words, read_safetensors_header
from skyrun.quant.sources.arrange import apply_scales, join, unwrap
from skyrun.quant.sources.foreign import check_known
from skyrun.quant.sources.source import SourceTensor
from skyrun.quant.sources.torch_file import read_torch_file

SUFFIXES = (".safetensors", ".gguf", ".pth", ".bin")  # best first, if the same part exists in several formats
_NAMED_ONLY = (".pt", ".ckpt")  # trainers' own files, which are read only if the user names them
_DEPTH = 2  # of subfolders, such as google/umt5-xxl
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_LINKS = (*SUFFIXES, ".json", ".model", "")  # suffixes of links that a model needs; "" for links to folders


@dataclass(frozen=True)
class Part:
    """Files that make up one set of tensors.

    label: how messages name it. config: the model's settings that are stored inside or beside the files, with the keys
    of the program that wrote them. config_source: where they are stored.
    """

    label: str
    files: tuple[Path, ...]
    tensors: dict[str, SourceTensor]
    config: dict[str, Any]
    config_source: str
    gguf: GGUFFile | None = None

    @property
    def folder(self) -> Path:
        return self.files[0].parent


@dataclass
class _Group:
    """Files that are read as one part: shards that an index lists, numbered shards, or a single file."""

    files: list[Path]
    index: Path | None = None


def open_parts(source: Path, coming: Mapping[Path, int]) -> tuple[list[Part], list[SkyrunError]]:
    """Every part that a folder holds, or the one that a file belongs to; and the errors of parts that cannot be read.

    coming: the final sizes of files of which only the header has been downloaded.
    """
    if not source.exists():
        raise SkyrunError(f"{source} does not exist", "give a downloaded checkpoint", MODEL_MISSING)
    if source.is_dir():
        _check_links(source)
        groups = [group for folder in folders(source) for group in _groups(folder)]
    else:
        if source.suffix not in SUFFIXES + _NAMED_ONLY:
            raise SkyrunError(
                f"{source} is not a file of tensors",
                f"expected a checkpoint folder, or a file that ends in {', '.join(SUFFIXES)}",
            )
        groups = [group for group in _groups(source.parent) if source in group.files] or [_Group([source])]
    parts, errors = [], []
    for group in groups:
        try:
            parts.append(_part(group, source if source.is_dir() else source.parent, coming))
        except SkyrunError as error:
            errors.append(error)
    return parts, errors


def snapshot(source: Path) -> Path:
    """The snapshot's folder if the source is a repository in Hugging Face's cache; otherwise the source itself."""
    revisions = source / "snapshots"
    if not (revisions.is_dir() and (source / "blobs").is_dir()):
        return source
    there = sorted(path for path in revisions.iterdir() if path.is_dir())
    main = source / "refs" / "main"
    named = revisions / main.read_text().strip() if main.is_file() else None
    if named in there:
        return revisions / named.name
    if len(there) != 1:
        said = ", ".join(path.name for path in there) or "none"
        raise SkyrunError(f"{source} is a folder of Hugging Face's cache with snapshots: {said}", "give one of them")
    return there[0]


def _check_links(source: Path) -> None:
    broken = [
        f"{path} is a link to {os.readlink(path)}, which is not there"
        for folder in folders(source)
        for path in sorted(folder.iterdir())
        if path.is_symlink() and not path.exists() and path.suffix in _LINKS and not path.name.startswith(".")
    ]
    if broken:
        hint = "download what the links lead to (hf download), or give a folder without them"
        raise SkyrunError.listing(f"{source} is not whole", brief(broken, "are not there"), hint, MODEL_MISSING)


def folders(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The folder and its subfolders, two levels deep by default."""
    yield folder
    for inside in sorted(folder.iterdir()):
        if depth and inside.is_dir() and not inside.name.startswith("."):
            yield from folders(inside, depth - 1)


def _groups(folder: Path) -> list[_Group]:
    files = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file()]
    indexes = sorted(folder.glob("*.index.json"))
    if any(path.suffix == ".safetensors" for path in files):  # .bin is transformers' older format of the same model
        files = [path for path in files if path.suffix != ".bin"]
        indexes = [index for index in indexes if not index.name.endswith(".bin.index.json")]
    groups = {index.name: _Group(_named_shards(index), index) for index in indexes}
    owned = {shard for group in groups.values() for shard in group.files}
    for path in files:
        if path not in owned and not path.name.startswith("."):
            numbered = _SHARD.fullmatch(path.name)
            name = f"{numbered[1]} of {numbered[3]}{numbered[4]}" if numbered else path.name
            groups.setdefault(name, _Group([])).files.append(path)
    return list(groups.values())


def _named_shards(index: Path) -> list[Path]:
    """The files that an index lists; none if it is damaged, which `_check_whole` reports."""
    try:
        weight_map = read_json(index).get("weight_map")
    except SkyrunError:
        return []
    names = weight_map.values() if isinstance(weight_map, dict) else []
    return sorted({index.parent / Path(name).name for name in names if isinstance(name, str) and name})


def _check_whole(group: _Group) -> None:
    if group.index:
        read_json(group.index)
        if not group.files:
            raise SkyrunError(f"{group.index} has no weight_map of tensors to files", "download it again")
        title = f"{group.index.name} names shards that are not there"
        missing = [f"{path} is missing" for path in group.files if not (is_possible(path) and path.is_file())]
    else:
        numbered = _SHARD.fullmatch(group.files[0].name)
        if numbered is None:
            return
        title = f"shards of {numbered[1]} are not there"
        there = {path.name for path in group.files}
        names = [f"{numbered[1]}-{n + 1:05}-of-{numbered[3]}{numbered[4]}" for n in range(int(numbered[3]))]
        missing = [f"{group.files[0].parent / name} is missing" for name in names if name not in there]
    if missing:
        raise SkyrunError.listing(title, brief(missing, "are missing"), "download them again")


def _part(group: _Group, source: Path, coming: Mapping[Path, int]) -> Part:
    _check_whole(group)
    tensors: dict[str, SourceTensor] = {}
    twice = []
    texts: dict[str, Any] = {}
    gguf = None
    for file in group.files:
        if file.suffix == ".gguf":
            opened = open_gguf(file)
            gguf = gguf or opened  # the first part of a split file has the metadata
            found = _gguf_tensors(opened)
        elif file.suffix == ".safetensors":
            header = read_safetensors_header(file, coming.get(file))
            texts |= header.metadata
            found = {n: SourceTensor(n, t.shape, t.dtype, file, t.offset) for n, t in header.tensors.items()}
        else:
            found = read_torch_file(file)
        twice += [f"{n} is in both {tensors[n].file.name} and {file.name}" for n in found if n in tensors]
        tensors |= found
    name = group.files[0] if len(group.files) == 1 else group.files[0].parent
    label = str(name.relative_to(source)) if name != source else str(source)
    tensors, problems = _arranged(label, tensors, texts)
    if problems or twice:
        hint = "compare them with the published files, or download those"
        raise SkyrunError.listing(f"cannot use {name}", [*brief(twice, "are there twice"), *problems], hint)
    if own := _own_words(gguf, texts):
        return Part(label, tuple(group.files), tensors, own, f"the header of {group.files[0]}", gguf)
    config = group.files[0].parent / "config.json"
    return Part(label, tuple(group.files), tensors, read_json(config), str(config), gguf)


def _arranged(
    label: str, tensors: dict[str, SourceTensor], texts: Mapping[str, Any]
) -> tuple[dict[str, SourceTensor], list[str]]:
    """The tensors as the name tables list them, and problems. Raises Unsupported for formats that are not read."""
    tensors, wrapped = unwrap(tensors)
    check_known(label, tensors, texts)
    tensors, unscaled = apply_scales(tensors)
    tensors, apart = join(tensors)
    return tensors, [*wrapped, *unscaled, *apart]


def _gguf_tensors(file: GGUFFile) -> dict[str, SourceTensor]:
    return {
        name: SourceTensor(name, info.shape, info.format.name, file.path, info.offset)
        for name, info in file.tensors.items()
    }


def _own_words(gguf: GGUFFile | None, texts: dict[str, Any]) -> dict[str, Any]:
    """The settings in a file's metadata: GGUF keys without their prefix, or skyrun's JSON in a safetensors file."""
    if gguf:
        own = {key: value for key, value in gguf.metadata.items() if not key.startswith(("general.", "tokenizer."))}
        return {re.sub(r"^(skyrun|clip\.vision|clip|[^.]+)\.", "", key): value for key, value in own.items()}
    try:
        return own_words(texts)
    except ValueError:
        return {}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if the file does not exist. Raises SkyrunError for anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise SkyrunError(f"{path} is not JSON: {error}", "it is damaged: download it again") from error
    if not isinstance(content, dict):
        raise SkyrunError(f"{path} holds a {type(content).__name__}, expected an object", "download the published one")
    return content
