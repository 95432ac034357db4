"""Sizes of the published models, so that plans can be made without downloading them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import prod

from skyrun.kernels.files.names import Table
from skyrun.kernels.files.recipes import RECIPES, recipe_types
from skyrun.kernels.formats import FORMATS
from skyrun.kernels.name_tables import (
    CLIP_VISION,
    UMT5_ENCODER,
    WAN_AUDIO_TRANSFORMER,
    WAN_IMAGE_TRANSFORMER,
    WAN_RATE_TRANSFORMER,
    WAN_TRANSFORMER,
    WAN_VAE,
    WAV2VEC2,
)
from skyrun.planning.request import Request
from skyrun.presets import Candidate, Workload
from skyrun.presets.workload import AREAS
from skyrun.tasks import TaskSpec, spec_of
from skyrun.tasks.windows import Window, amounts

UMT5_XXL = {"dim": 4096, "inner": 4096, "ffn": 10240, "vocab": 256384, "buckets": 32, "heads": 64}
VAE = {"base": 96, "z": 16}
LAYERS, TEXT_LAYERS = 40, 24
OFFERED = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")  # types that a plan chooses from, best first
_TEXT_LENGTH = 512  # tokens of a prompt that the models read
_CLIP_LAYERS, _CLIP_DIM, _CLIP_TOKENS = 32, 1280, 257
_CLIP = {"dim": _CLIP_DIM, "ffn": 5120, "patch": 14, "positions": _CLIP_TOKENS, "projection": 1024, "layers": 32}
_WAV2VEC2 = {f"kernel{layer}": width for layer, width in enumerate((10, 3, 3, 3, 3, 2, 2))} | {
    **{"conv": 512, "dim": 768, "ffn": 3072, "group": 48, "position_kernel": 128, "layers": 12}
}


def with_clip(workload: Workload, request: Request, size: tuple[int, int], windows: Sequence[Window]) -> Workload:
    """A model's workload with the size and length of a clip.

    Args:
        workload: of the model.
        request: the clip, with the values of its model.
        size: (height, width) in pixels.
        windows: the windows of the clip.
    """
    return replace(
        workload,
        contexts=request.contexts,
        devices=request.devices,
        avoided_tokens=_TEXT_LENGTH if request.nag is not None else 0,
        height=size[0],
        width=size[1],
        steps=request.passes,
        windowed=request.spec.windowed,
        areas=tuple(area for area in AREAS if area[0] in request.spec.resolutions),
        **amounts(windows),  # type: ignore[arg-type]
    )


@cache
def block_bytes(task: str, quant: str, model: str | None = None) -> int:
    """Bytes of the largest block of a task's transformer, with the types that a recipe mixes."""
    block = _block(spec_of(task, model))
    types = recipe_types((name for name, shape in block if len(shape) == 2), RECIPES[quant])
    return sum(_stored(shape, types.get(name, "F32")) for name, shape in block)


@cache
def published_workload(task: str, quant: str | None = None, model: str | None = None) -> Workload:
    """A published model, no clip yet. quant: the recipe of its file; None: the best of those on offer.

    model: its name, where a task has several.
    """
    spec = spec_of(task, model)
    avatar = transformer_table(spec) is WAN_AUDIO_TRANSFORMER
    outer = transformer_table(spec).shapes("original", {**spec.dims, "layers": 0}).items()
    text = _in_blocks(UMT5_ENCODER, "gguf", {**UMT5_XXL, "layers": 1}, "enc.blk.")
    return Workload(
        task=task,
        height=0,
        width=0,
        frames=0,
        latent_frames=0,
        steps=0,
        layers=spec.dims.get("layers", LAYERS),
        dim=spec.dims["dim"],
        ffn_dim=spec.dims["ffn"],
        weight_type=RECIPES[quant or OFFERED[0]].base,
        block_bytes=block_bytes(task, quant or OFFERED[0], model),
        outer_bytes=sum(_stored(shape, "BF16") for _, shape in outer),
        text_layers=TEXT_LAYERS,
        text_dim=UMT5_XXL["dim"],
        text_block_bytes=sum(_stored(shape, "Q8_0") for name, shape in text if "rel_b" not in name),
        vae_base_dim=VAE["base"],
        vae_weights=sum(prod(shape) for shape in WAN_VAE.shapes("original", VAE).values()),
        token_matrices=2 if avatar else 0,
        context_matrices=2 if avatar else 0,
        image_layers=_CLIP_LAYERS if spec.sees_image else 0,
        image_block_bytes=2 * 12 * _CLIP_DIM**2 if spec.sees_image else 0,
        context_tokens=_TEXT_LENGTH + (_CLIP_TOKENS if spec.sees_image else 0),
        candidates=() if quant else tuple(Candidate(name, block_bytes(task, name, model)) for name in OFFERED),
    )


@cache
def part_bytes(task: str, model: str | None = None) -> dict[str, int]:
    """What the files besides the transformer take on a disk, by role, in the types that they are fetched or kept in."""
    sizes = {
        "text encoder": (UMT5_ENCODER, "gguf", {**UMT5_XXL, "layers": TEXT_LAYERS}, "Q8_0"),
        "autoencoder": (WAN_VAE, "original", VAE, "F32"),
        "image encoder": (CLIP_VISION, "gguf", _CLIP, "Q8_0"),
        "audio encoder": (WAV2VEC2, "transformers", _WAV2VEC2, "F32"),
    }
    found = {}
    for role in spec_of(task, model).parts:
        table, naming, dims, type = sizes[role]
        found[role] = sum(_stored(shape, type) for shape in table.shapes(naming, dims).values())
    return found


def transformer_table(spec: TaskSpec) -> Table:
    """The names of the tensors of a task's transformer."""
    if "audio_dim" in spec.dims:
        return WAN_AUDIO_TRANSFORMER
    if "rates" in spec.dims:
        return WAN_RATE_TRANSFORMER
    return WAN_IMAGE_TRANSFORMER if spec.sees_image else WAN_TRANSFORMER


def published_shapes(spec: TaskSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a task's transformer, by original name."""
    return transformer_table(spec).shapes("original", {"layers": LAYERS, **spec.dims})


def _block(spec: TaskSpec) -> list[tuple[str, tuple[int, ...]]]:
    return _in_blocks(transformer_table(spec), "original", {**spec.dims, "layers": 1}, "blocks.")


def _in_blocks(table: Table, naming: str, dims: Mapping[str, int], prefix: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, shape in table.shapes(naming, dims).items() if name.startswith(prefix)]


def _stored(shape: tuple[int, ...], type: str) -> int:
    """Matrices have that type, everything else is float32."""
    kind = FORMATS[type if len(shape) == 2 else "F32"]
    return prod(shape[:-1]) * kind.row_bytes(shape[-1])
