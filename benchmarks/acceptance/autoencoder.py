"""The autoencoder of the published size, with random weights: each dtype, whole frames and slabs."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

from acceptance.step import Figure, Scale
from skyrun.kernels.name_tables import WAN_VAE
from skyrun.models.vae import WanVAE
from skyrun.planning.published import VAE, published_workload
from skyrun.presets.memory import ALLOCATOR_BYTES, GIB, vae_bytes, vae_copy_bytes
from skyrun.streaming.device import finish
from skyrun.tools.bench.checks import relative_error

_FRAMES = 3  # latent ones; the first is decoded to one frame, the others to four
_DTYPES = ("float32", "bfloat16", "float16")  # the first is what others are compared with
_APART = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 5e-3}  # from float32 on whole frames


@torch.inference_mode()
def autoencoder(scale: Scale) -> Iterator[Figure]:
    """Time of a frame, peak against what plans count, and distance from float32; decoding, then encoding."""
    height, width = scale.of((720, 1280), (32, 48))
    dims = scale.of(VAE, {"base": 4, "z": 16})
    slab = (-(-height // 8), width)
    weights = sum(prod(shape) for shape in WAN_VAE.shapes("original", dims).values())
    work = replace(
        published_workload("r2v"), height=height, width=width, vae_base_dim=dims["base"], vae_weights=weights
    )
    latents = torch.randn(dims["z"], _FRAMES, height // 8, width // 8)
    video = torch.rand(3, 1 + 4 * (_FRAMES - 1), height, width) * 2 - 1
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vae.safetensors"
        _write(path, dims)
        expected: dict[str, Tensor] = {}
        for dtype in scale.of(_DTYPES, _DTYPES[:2]):
            for tile in (None, slab):
                for what in ("decode", "encode"):
                    counted = vae_bytes(work, what, dtype, tile) + vae_copy_bytes(work, what, dtype, tile)
                    counted += ALLOCATOR_BYTES
                    vae = WanVAE(path, scale.device, getattr(torch, dtype), tile)
                    result, seconds, peak = _timed(scale, vae, what, latents if what == "decode" else video)
                    del vae
                    finish(scale.device)
                    name = f"{what} {dtype}, {'whole frames' if tile is None else f'slabs of {tile[0]} rows'}"
                    yield Figure(name, seconds, "s a latent frame")
                    yield Figure(f"{name}, peak", peak / GIB, "GiB", most=scale.on_card(counted / GIB))
                    error = relative_error(result, expected.setdefault(what, result))
                    yield Figure(name, error, "apart from float32", most=_APART[dtype])


def _timed(scale: Scale, vae: WanVAE, what: str, given: Tensor) -> tuple[Tensor, float, int]:
    """The result on the host, the seconds of a latent frame after the first, and the peak of what was reserved."""
    if not scale.small:
        torch.cuda.reset_peak_memory_stats(scale.device)
    parts, marks = [], []
    groups = vae.decode(given) if what == "decode" else iter([vae.encode(given)[0]])
    start = time.perf_counter()
    for part in groups:
        parts.append(part.cpu())
        marks.append(time.perf_counter())
    # Encoding is one call: its frames are counted together, the first one with them.
    seconds = (marks[-1] - marks[0]) / (_FRAMES - 1) if len(marks) > 1 else (marks[0] - start) / _FRAMES
    peak = 0 if scale.small else torch.cuda.max_memory_reserved(scale.device)
    return torch.cat(parts, 1), seconds, peak


def _write(path: Path, dims: dict[str, int]) -> None:
    """Random weights that keep activations about as large as they are."""
    shapes = WAN_VAE.shapes("original", dims)
    values = {
        name: torch.ones(shape) if name.endswith("gamma") else torch.randn(shape) / math.sqrt(prod(shape[1:]) or 1)
        for name, shape in shapes.items()
    }
    save_file(values, path)
