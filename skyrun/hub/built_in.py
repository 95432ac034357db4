"""Convert a model that comes with the package. Nothing is downloaded."""

import hashlib
from functools import cache
from pathlib import Path

import skyrun.demo
from skyrun.hub.manifest import Manifest, note_use
from skyrun.hub.store import Name, alone_in, folder_of

QUANT = "Q4_K_M"  # if no type is named
CHECKPOINT = Path(skyrun.demo.__file__).parent / "checkpoint"


def built_in_folder(name: Name) -> Path:
    """The folder of the converted model. It is converted now unless that was done before from the same checkpoint."""
    quant = name.quant or QUANT
    folder = folder_of(name, quant)
    if is_converted(name):
        note_use(folder)
        return folder
    from skyrun.quant.conversion import convert  # a run with files that are there does not need the quantizer

    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, f"another skyrun is writing {folder}"):
        if not is_converted(name):  # another process may have written it meanwhile
            written = [Path(file["path"]).name for file in convert(CHECKPOINT, folder, quant)["files"]]
            Manifest(name.stem, quant, {name.repo: _digest()}, {name.repo: written}, [], True, name.task).write(folder)
    return folder


def is_converted(name: Name) -> bool:
    """Whether the model is there, whole, converted from the checkpoint that comes with this package."""
    folder = folder_of(name, name.quant or QUANT)
    manifest = Manifest.read(folder)
    return manifest is not None and manifest.commits == {name.repo: _digest()} and manifest.is_whole(folder)


@cache
def _digest() -> str:
    """A digest of the checkpoint, in place of a commit."""
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(CHECKPOINT.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(CHECKPOINT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
