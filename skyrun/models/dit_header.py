"""Read from the header of a Wan transformer file which tensors it has, its dims, and where its blocks lie."""

from dataclasses import dataclass, fields, replace
from functools import lru_cache

from skyrun.errors import SkyrunError
from skyrun.kernels.files.gguf_file import GGUFFile, TensorInfo
from skyrun.kernels.files.names import Match, fits, recognise, strays
from skyrun.kernels.name_tables import TRANSFORMERS
from skyrun.streaming.layout import Block, lay_out_blocks

HEAD_DIM = 128
AUDIO_LAYERS = 12  # of the audio encoder; a frame's features are the outputs of all of them
_HEADER_CACHE_SIZE = 8
_AUDIO_WINDOW = 5  # frames of audio around a video frame, if the file does not say


@dataclass(frozen=True)
class DiTDims:
    """Dims of a transformer. All are derived from its tensors; metadata that disagrees is an error."""

    dim: int
    heads: int
    layers: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    eps: float = 1e-6
    rates: int = 0  # of a transformer that is told one of several frame rates
    image_dim: int = 0  # of a transformer that attends to tokens of an image
    audio_window: int = 0  # this one and the following are of a talking-avatar transformer
    audio_channels: int = 0
    audio_dim: int = 0
    context_tokens: int = 0


@lru_cache(_HEADER_CACHE_SIZE)
def canonical_tensors(file: GGUFFile) -> dict[str, TensorInfo]:
    """The file's tensors by original Wan name and with torch's shapes, whatever naming, prefix and axes the file has.

    Tensors that the model does not know keep their names.
    """
    match, dims, _ = _checked(file)
    rows = {row.name(): row.sizes(dims) for row in match.table.expand(match.layers)}
    tensors = {}
    for name, in_file in match.names.items():
        info, expected = file.tensors[in_file], rows.get(name)
        restored = expected if expected and fits(info.shape, expected) else info.shape
        tensors[name] = replace(info, shape=restored)
    unknown, _ = strays(file.tensors, [match])
    return tensors | {name.removeprefix(match.prefix): file.tensors[name] for name in unknown}


def _recognised(file: GGUFFile) -> Match:
    matches = recognise(file.tensors, TRANSFORMERS)
    if not matches:
        raise SkyrunError(
            f"{file.path} is not a Wan transformer: it has no tensors such as patch_embedding.weight",
            "convert the published checkpoint: skyrun convert CHECKPOINT -o DIR",
        )
    return matches[0]


@lru_cache(_HEADER_CACHE_SIZE)
def _checked(file: GGUFFile) -> tuple[Match, dict[str, int], list[str]]:
    """The family, the dims that the tensors imply, and sentences about missing and misshapen tensors."""
    match = _recognised(file)
    window = file.metadata.get("skyrun.audio_window")
    known = {"audio_window": window if isinstance(window, int) and window > 0 else _AUDIO_WINDOW}
    return match, *match.check({name: info.shape for name, info in file.tensors.items()}, known)


@lru_cache(_HEADER_CACHE_SIZE)
def read_dims(file: GGUFFile) -> DiTDims:
    """The dims that the tensors imply. Raises SkyrunError if any is missing, misshapen or contradicts the metadata."""
    layers = len(block_layouts(file))
    match, sizes, missing = _checked(file)
    problems = [*missing, *(f"{name} is not a tensor of this model" for name in strays(file.tensors, [match])[0])]
    if problems:
        raise SkyrunError.listing(f"{file.path} is not a whole transformer", problems, "convert or download it again")
    dims = DiTDims(
        dim=sizes["dim"],
        heads=sizes["dim"] // HEAD_DIM,
        layers=layers,
        ffn_dim=sizes["ffn"],
        in_channels=sizes["in"],
        out_channels=sizes["out"],
        text_dim=sizes["text"],
        freq_dim=sizes["freq"],
        eps=file.number("skyrun.eps", 1e-6),
        rates=sizes.get("rates", 0),
        image_dim=sizes.get("image", 0),
        **(_avatar(sizes) if "audio_features" in sizes else {}),
    )
    if dims.dim % HEAD_DIM:
        problems.append(f"its width {dims.dim} is not a multiple of the {HEAD_DIM} of a head")
    for field in fields(dims):
        value = file.metadata.get(f"skyrun.{field.name}")
        if value is not None and value != getattr(dims, field.name):
            problems.append(f"its metadata says {field.name} = {value}, its tensors {getattr(dims, field.name)}")
    if problems:
        raise SkyrunError.listing(f"{file.path} contradicts itself", problems, "convert or download it again")
    return dims


def _avatar(sizes: dict[str, int]) -> dict[str, int]:
    channels = sizes["audio_features"] // AUDIO_LAYERS
    kept = {name: sizes[name] for name in ("audio_window", "audio_dim", "context_tokens")}
    return {"audio_channels": channels, **kept}


@lru_cache(_HEADER_CACHE_SIZE)
def block_layouts(file: GGUFFile) -> list[Block]:
    """The layout of each block, in execution order."""
    return lay_out_blocks(file.path, canonical_tensors(file), "blocks.")
