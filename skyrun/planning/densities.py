"""What share of its tiles attention read in earlier runs, by the model, the size and the steps of their clips."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from skyrun.kernels.machine.cache import MeasuredFile, checked
from skyrun.presets import Workload
from skyrun.presets.attention import USUAL_BOUND, parse_attention
from skyrun.version import __version__


def remember_density(workload: Workload, bound: float, density: float) -> None:
    """Keep the density that a run had after its first step, for the plans of others like it."""

    def merge(kept: dict[str, float] | None) -> dict[str, Any]:
        return {"densities": (kept or {}) | {_kind(workload, bound): density}}

    with suppress(OSError):  # the next run will measure it too
        _file().update(merge)


def with_density(workload: Workload, attention: str | None) -> Workload:
    """The workload with the density of earlier runs of its kind, where one is known.

    attention: what is asked for. Its bound counts, or else the usual one.
    """
    bound = parse_attention(attention).bound if attention else None
    known = (_file().load() or {}).get(_kind(workload, USUAL_BOUND if bound is None else bound), 0.0)
    return replace(workload, density=known)


def _kind(work: Workload, bound: float) -> str:
    """What runs have in common that read alike."""
    model = f"{work.task} {work.layers}x{work.dim}"
    return f"{model}, {work.height}x{work.width}, {work.latent_frames} latent frames, {work.steps} steps, {bound:.6g}"


def _file() -> MeasuredFile[dict[str, float]]:
    return MeasuredFile("densities.json", {"skyrun": __version__}, _parsed)


def _parsed(values: dict[str, Any]) -> dict[str, float]:
    densities = {str(kind): checked(density) for kind, density in values["densities"].items()}
    if not all(0 < density <= 1 for density in densities.values()):
        raise ValueError("a density is no share")
    return densities
