"""What a plan says beside its numbers: what another choice would gain, and what to do where no card is there."""

from typing import TYPE_CHECKING

from skyrun.presets.memory import GIB
from skyrun.presets.options import NEARLY, POOR_TYPES
from skyrun.presets.workload import Workload

if TYPE_CHECKING:
    from skyrun.presets.plan import Plan

USUAL_CARD = "RTX 3060"
PATIENCE = 3600  # seconds that nobody needs advice for
_MORE = 1.1  # times as much memory is worth a word


def gain(plan: "Plan", other: "Plan", option: str, what_for: str) -> str:
    """That a quicker plan could be had; empty if it is not noticeably quicker, or does not fit.

    Args:
        plan: the one that was chosen.
        other: the quicker one.
        option: how to ask for it.
        what_for: what the chosen one is slower for.
    """
    if other.problem or NEARLY * other.seconds >= plan.seconds:
        return ""
    parts = [f"{other.weight_type} in {other.dtype}" + " and int8" * (other.precision == "fast")]
    if other.vae_dtype != plan.vae_dtype:
        parts.append(f"the autoencoder in {other.vae_dtype}")
    if other.weight_type in POOR_TYPES:
        parts.append("visible errors")
    if other.peak_bytes > _MORE * plan.peak_bytes:
        parts.append(f"{other.peak_bytes / GIB:.1f} GiB of memory")
    saved = f"{1 - other.seconds / plan.seconds:.0%} less time, about {about(other.seconds)}"
    return f"this plan takes more time for {what_for}: {option} takes {saved}, with {', '.join(parts)}"


def without_card(plan: "Plan", with_card: "Plan", smaller: Workload, smaller_plan: "Plan") -> str:
    """What a CPU takes so long for, beside what a usual card would take, and what it makes sooner."""
    text = f"a CPU takes about {about(plan.seconds)} for this clip"
    if not with_card.problem:
        text += f", an {USUAL_CARD} would take about {about(with_card.seconds)}"
    size = f"{smaller.height}x{smaller.width} with {smaller.frames} frames"
    return f"{text}; without a card make a smaller one: {size} would take about {about(smaller_plan.seconds)}"


def about(seconds: float) -> str:
    """A time as people say it."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
