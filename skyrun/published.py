"""The published models in numbers: what can be planned without having them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from math import prod

from skyrun.kernels.formats import FORMATS
from skyrun.kernels.name_tables import UMT5_ENCODER, WAN_AUDIO_TRANSFORMER, WAN_TRANSFORMER, WAN_VAE
from skyrun.kernels.names import Table
from skyrun.presets import Candidate, Workload
from skyrun.presets.workload import AREAS
from skyrun.tasks import TASKS

Dims = Mapping[str, int]

WAN_14B = {"dim": 5120, "ffn": 13824, "in": 16, "out": 16, "freq": 256, "text": 4096}
_AVATAR = {
    **{"in": 36, "image": 1280, "audio_window": 5, "middle_window": 8, "audio_features": 12 * 768},
    **{"audio_hidden": 512, "audio_dim": 768, "context_tokens": 32},
}
UMT5_XXL = {"dim": 4096, "inner": 4096, "ffn": 10240, "vocab": 256384, "buckets": 32, "heads": 64}
VAE = {"base": 96, "z": 16}
LAYERS, TEXT_LAYERS = 40, 24
# By task; a video goes on, or cuts to its next shot, by models of one shape.
TRANSFORMERS: dict[str, tuple[Table, Dims]] = {
    "r2v": (WAN_TRANSFORMER, WAN_14B),
    "v2v": (WAN_TRANSFORMER, WAN_14B),
    "shot": (WAN_TRANSFORMER, WAN_14B),
    "a2v": (WAN_AUDIO_TRANSFORMER, WAN_14B | _AVATAR),
}
OFFERED = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")  # what is worth choosing from, best first
_CLIP_LAYERS, _CLIP_DIM, _CLIP_TOKENS = 32, 1280, 257


@cache
def block_bytes(task: str, type: str) -> int:
    """Bytes of a transformer's block whose matrices have that type."""
    return sum(_stored(name, shape, type) for name, shape in _block(task))


def published_workload(task: str, type: str | None, **clip: int) -> Workload:
    """A clip by the published model. type: of its weights, None: whichever of those on offer is best.

    clip: what a Workload takes of the clip itself.
    """
    return replace(_published(task, type), **clip)  # type: ignore[arg-type]


@cache
def _published(task: str, type: str | None) -> Workload:
    table, dims = TRANSFORMERS[task]
    outer = table.shapes("original", {**dims, "layers": 0}).items()
    text = _in_blocks(UMT5_ENCODER, "gguf", {**UMT5_XXL, "layers": 1}, "enc.blk.")
    avatar = task == "a2v"
    return Workload(
        task=task,
        **dict.fromkeys(("height", "width", "frames", "latent_frames", "steps"), 0),
        layers=LAYERS,
        dim=dims["dim"],
        ffn_dim=dims["ffn"],
        weight_type=type or OFFERED[0],
        block_bytes=block_bytes(task, type or OFFERED[0]),
        outer_bytes=sum(_stored(name, shape, "BF16") for name, shape in outer),
        text_layers=TEXT_LAYERS,
        text_dim=UMT5_XXL["dim"],
        text_block_bytes=sum(_stored(name, shape, "Q8_0") for name, shape in text if "rel_b" not in name),
        vae_base_dim=VAE["base"],
        vae_weights=sum(prod(shape) for shape in WAN_VAE.shapes("original", VAE).values()),
        token_matrices=2 if avatar else 0,
        context_matrices=2 if avatar else 0,
        areas=tuple(area for area in AREAS if area[0] in TASKS[task].resolutions),
        image_layers=_CLIP_LAYERS if avatar else 0,
        image_block_bytes=2 * 12 * _CLIP_DIM**2 if avatar else 0,
        context_tokens=512 + (_CLIP_TOKENS if avatar else 0),
        candidates=() if type else tuple(Candidate(name, block_bytes(task, name)) for name in OFFERED),
    )


def _block(task: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    table, dims = TRANSFORMERS[task]
    yield from _in_blocks(table, "original", {**dims, "layers": 1}, "blocks.")


def _in_blocks(table: Table, naming: str, dims: Dims, prefix: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, shape in table.shapes(naming, dims).items() if name.startswith(prefix)]


def _stored(name: str, shape: tuple[int, ...], type: str) -> int:
    """Matrices have that type, everything else is float32."""
    kind = FORMATS[type if len(shape) == 2 else "F32"]
    return prod(shape[:-1]) * kind.row_bytes(shape[-1])
