"""Convert a published checkpoint while it arrives, so that the disk never has to hold all of it.

The headers of safetensors files are downloaded first; they determine every byte of the result but the weights. Then the
files follow one by one, and each is deleted when its tensors are written. A `.pth` file has no header: it is downloaded
as a whole before anything is known about it.
"""

from collections.abc import Generator, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path

from skyrun.errors import BAD_INPUT, SkyrunError
from skyrun.events import Event, Progress, StageEnded, StageStarted, drain, now
from skyrun.hub.client import fetch, is_here, read_start
from skyrun.hub.repository import RemoteFile, Repository
from skyrun.kernels import block_format
from skyrun.kernels.files.recipes import find_recipe
from skyrun.quant.choose.recipes import default_encoder_quant
from skyrun.quant.conversion import write_file
from skyrun.quant.partial import finished_before
from skyrun.quant.plan import Conversion, PlannedFile, Settings
from skyrun.quant.planner import plan_conversion

_WHOLE = (".pth", ".bin")  # files without a header, which are downloaded as a whole
_TEXTS = (".json", ".model")
_LARGEST_TEXT = 64 << 20
_SMALL_TEXT = 1 << 20  # smaller files are downloaded without asking what they are for
_HEAD = 1 << 16  # bytes that are requested first; most headers are shorter
_LARGEST_HEAD = 100 << 20  # limit of the safetensors format
_SMALL = 1 << 30  # a .pth file below this size will not be quantized
_SOURCE_BITS = 16.0

# Bytes in the header of a file of weights, and the role that they show.
_MARKS = {
    b"visual.cls_embedding": "image_encoder",
    b"embeddings.class_embedding": "image_encoder",
    b"decoder.conv_in.weight": "vae",
    b"decoder.conv1.weight": "vae",
    b".SelfAttention.": "text_encoder",
    b"pos_embedding.embedding.weight": "text_encoder",
    b"attn1.to_q.weight": "transformer",
    b"cross_attn.q.weight": "transformer",
    b"feature_extractor.conv_layers": "audio_encoder",
}
# Words in the names of the published .pth files, and the roles that they show.
_WORDS = {"t5": "text_encoder", "clip": "image_encoder", "vae": "vae"}


@dataclass(frozen=True)
class Step:
    """A part of a checkpoint that becomes one or more files.

    sources: its files of weights, by the path that they are downloaded to. places: those that are still needed.
    results: names and bytes of the files that it becomes; if a name is not known yet, it is "", and the size is an
    estimate. files: what will be written, if that is known.
    """

    role: str
    results: dict[str, int]
    files: tuple[PlannedFile, ...]
    sources: dict[Path, RemoteFile]
    places: dict[Path, RemoteFile]
    out: Path
    quant: str

    @property
    def keys(self) -> list[str]:
        """The keys of its files in a manifest."""
        return [file.key for file in self.sources.values()]

    @property
    def passing_bytes(self) -> int:
        """The most bytes that are on the disk at once besides the results."""
        return max((file.nbytes for file in self.places.values()), default=0)

    def run(self) -> Generator[Event, None, list[Path]]:
        """Download and convert, or resume an interrupted run. Returns the files that were written."""
        files = self.files
        if not files:
            for place, file in self.sources.items():
                yield from fetch(file, place)
            (first, *_) = self.sources
            files = _planned(first, self.out, Settings(default_encoder_quant(self.quant)), {}).files
        for planned in files:
            done = finished_before(planned)
            needed = {tensor.source.file for tensor in planned.tensors if tensor.name not in done}
            last = bool(self.files) and planned is files[-1]
            for place in planned.sources:
                if place in needed:
                    yield from fetch(self.sources[place], place)
                    yield from _converted(planned, place)
                    if last:
                        place.unlink()
        return [planned.path for planned in files]

    def text(self) -> list[tuple[str, int]]:
        """A line about the files that are still needed, and their size."""
        files = sorted(self.places.values(), key=lambda file: file.path)
        if not files:
            return []
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        return [(f"{files[0].path}{others}", sum(file.nbytes for file in files))]

    def clean(self) -> None:
        """Delete the downloads, after the manifest lists the written files."""
        for place in self.sources:
            place.unlink(missing_ok=True)


def _converted(planned: PlannedFile, place: Path) -> Generator[Event, None, None]:
    """Convert the tensors of one file of the checkpoint."""
    stage, start, done = f"convert {place.name}", now(), 0
    yield StageStarted(stage, sum(tensor.nbytes for tensor in planned.tensors if tensor.source.file == place), "bytes")
    written = write_file(planned, source=place)
    next(written)  # the bytes that were written before
    for nbytes in written:
        done += nbytes
        yield Progress(stage, done)
    yield StageEnded(stage, now() - start)


def steps(
    repository: Repository, leave_out: tuple[str, ...], out: Path, work: Path, quant: str, roles: Set[str] = frozenset()
) -> list[Step]:
    """The parts of a checkpoint.

    Downloads its small files and the headers of the others. Raises SkyrunError if it is damaged or not a checkpoint.

    Args:
        repository: The files of the checkpoint.
        leave_out: Top-level folders to ignore.
        out: The folder for the converted files.
        work: The folder for downloads.
        quant: The type of the transformer.
        roles: The parts to return; if empty, all of them.
    """
    files = [file for file in repository.files if file.folder.split("/")[0] not in leave_out]
    if roles:
        files = _wanted(files, roles)
    for file in files:
        if file.name.endswith(_TEXTS) and file.nbytes <= _LARGEST_TEXT:
            drain(fetch(file, work / file.path))
    places = {work / file.path: file for file in files}
    found = [*_safetensors_steps(places, out, quant), *_whole_steps(places, out, quant)]
    if not found:
        raise SkyrunError(
            f"{repository.name} has no file of weights that skyrun reads",
            "expected a repository with .safetensors, .pth or .gguf files",
            BAD_INPUT,
        )
    names = [name for step in found for name in step.results if name]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SkyrunError(
            f"{repository.name} has {twice[0]} twice", "convert it by hand with skyrun convert", BAD_INPUT
        )
    return found


def _wanted(files: list[RemoteFile], roles: Set[str]) -> list[RemoteFile]:
    """The files without those that surely belong to other roles: their weights, and large tokenizers."""
    others: set[str] = set()
    own: set[str] = set()
    for file in files:
        if file.name.endswith(".safetensors"):
            role = _role_of(file)
            (own if not role or role in roles else others).add(_group(file))
    tokenizers = "text_encoder" in roles
    return [
        file
        for file in files
        if (_group(file) not in others or _group(file) in own)
        and (tokenizers or not file.name.endswith(_TEXTS) or file.nbytes <= _SMALL_TEXT)
        and not (file.name.endswith(_WHOLE) and (role := _role_of(file)) and role not in roles)
    ]


def _group(file: RemoteFile) -> str:
    """The folder of a file, whose files belong together; at the top level each file is its own group."""
    return file.folder or file.path


def _role_of(file: RemoteFile) -> str:
    """The role of a file of weights; "" if it is unknown."""
    if file.name.endswith(_WHOLE):
        for word, role in _WORDS.items():
            if word in file.name.lower():
                return role
    head = read_start(file, _HEAD)
    return next((role for mark, role in _MARKS.items() if mark in head), "")


def _safetensors_steps(places: dict[Path, RemoteFile], out: Path, quant: str) -> Iterator[Step]:
    weights = {place: file for place, file in places.items() if place.suffix == ".safetensors"}
    for place, file in weights.items():
        if not is_here(file, place):
            _write_head(file, place)
    coming = {place: file.nbytes for place, file in weights.items()}
    seen: set[Path] = set()
    for place in weights:
        if place in seen:
            continue
        conversion = _planned(place, out, Settings(quant), coming)
        role = conversion.files[0].role
        if role != "transformer":
            conversion = _planned(place, out, Settings(default_encoder_quant(quant)), coming)
        own = {source: weights[source] for planned in conversion.files for source in planned.sources}
        seen |= {place, *own}
        planned_files = tuple(_pinned(planned, own) for planned in conversion.files)
        results = {planned.path.name: planned.nbytes for planned in planned_files}
        yield Step(role, results, planned_files, own, _needed(planned_files, own), out, quant)


def _needed(files: tuple[PlannedFile, ...], sources: dict[Path, RemoteFile]) -> dict[Path, RemoteFile]:
    """The sources with tensors that are not written yet."""
    needed = set()
    for planned in files:
        done = finished_before(planned)
        needed |= {tensor.source.file for tensor in planned.tensors if tensor.name not in done}
    return {place: file for place, file in sources.items() if place in needed}


def _planned(place: Path, out: Path, settings: Settings, coming: dict[Path, int]) -> Conversion:
    return plan_conversion(place, out, settings, coming=coming)


def _pinned(planned: PlannedFile, remote: dict[Path, RemoteFile]) -> PlannedFile:
    """Identify the sources by the checksums of the hub, because the files on the disk come and go."""
    stamps = {place: (0, remote[place].nbytes, int(remote[place].identity[:15], 16)) for place in planned.sources}
    return replace(planned, sources=stamps)


def _write_head(file: RemoteFile, place: Path) -> None:
    """Write the header of a safetensors file to the path of the file."""
    if place.is_file() and (there := place.read_bytes()) and len(there) == _header_length(there):
        return
    head = read_start(file, _HEAD)
    length = _header_length(head)
    if length > len(head) and length <= min(_LARGEST_HEAD, file.nbytes):
        head = read_start(file, length)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(head[:length])


def _header_length(head: bytes) -> int:
    return 8 + int.from_bytes(head[:8], "little")


def _whole_steps(places: dict[Path, RemoteFile], out: Path, quant: str) -> Iterable[Step]:
    better = {place.parent for place in places if place.suffix == ".safetensors"}
    for place, file in places.items():
        if place.suffix not in _WHOLE or (place.suffix == ".bin" and place.parent in better):
            continue
        role = _role_of(file)
        share = 1.0 if file.nbytes < _SMALL else _bits(default_encoder_quant(quant)) / _SOURCE_BITS
        yield Step(role, {"": int(file.nbytes * share)}, (), {place: file}, {place: file}, out, quant)


def _bits(quant: str) -> float:
    return min(_SOURCE_BITS, block_format(find_recipe(quant).base).bits_per_weight)
