"""The notes of a plan: what another option would gain, and what to do without a graphics card."""

from typing import TYPE_CHECKING

from skyrun.presets.memory import GIB
from skyrun.presets.options import NEARLY, POOR_TYPES
from skyrun.presets.workload import Workload

if TYPE_CHECKING:
    from skyrun.presets.plan import Plan

USUAL_CARD = "RTX 3060"
PATIENCE = 3600  # seconds that a clip may take on a CPU without advice
_MORE = 1.1  # times as much memory is worth mentioning


def gain(plan: "Plan", other: "Plan", option: str, what_for: str) -> str:
    """A note that another plan is faster; empty if it does not fit or is not noticeably faster.

    Args:
        plan: the plan that was chosen.
        other: the faster plan.
        option: the command line option that selects the faster plan.
        what_for: what the chosen plan gains by being slower, for example "quality".
    """
    if other.problem or NEARLY * other.seconds >= plan.seconds:
        return ""
    parts = [f"{other.weight_type} in {other.dtype}" + precisions(other)]
    if other.weight_type in POOR_TYPES:
        parts.append("visible errors")
    if other.peak_bytes > _MORE * plan.peak_bytes:
        parts.append(f"{other.peak_bytes / GIB:.1f} GiB of memory")
    saved = f"{1 - other.seconds / plan.seconds:.0%} less time, about {about(other.seconds)}"
    return f"this plan takes more time for {what_for}: {option} takes {saved}, with {', '.join(parts)}"


def cost(plan: "Plan", best: "Plan") -> str:
    """A note of what quality would take that this plan does without; empty if it is the same or does not fit."""
    if best.problem or _quality(best) == _quality(plan):
        return ""
    more = best.seconds / plan.seconds - 1
    parts = f"{best.weight_type} in {best.dtype}{precisions(best)}, decoding in {best.decoding.dtype}"
    return f"--prefer quality takes {more:.0%} more time, about {about(best.seconds)}, with {parts}"


def _quality(plan: "Plan") -> tuple[str, ...]:
    return plan.weight_type, plan.dtype, plan.precision, plan.asked, plan.decoding.dtype


def precisions(plan: "Plan") -> str:
    """What a plan computes in other precisions, to follow the dtype of its activations; empty if nothing."""
    linear, attention = plan.precision == "fast", plan.attention
    if linear and attention == "int8" and plan.sparse is None:
        return " and int8"
    parts = ["int8 linear layers"] * linear
    if attention != "exact" or plan.sparse is not None:
        skips = "" if plan.sparse is None else f", sparse at {100 * plan.sparse:g} %"
        parts.append(f"{attention} attention{skips}")
    return f" and {' and '.join(parts)}" if parts else ""


def without_card(plan: "Plan", with_card: "Plan", smaller: Workload, smaller_plan: "Plan") -> str:
    """A note for plans on a CPU.

    Args:
        plan: the plan for the CPU.
        with_card: a plan for the same clip on a common graphics card.
        smaller: a smaller clip.
        smaller_plan: the plan for the smaller clip on the CPU.
    """
    text = f"a CPU takes about {about(plan.seconds)} for this clip"
    if not with_card.problem:
        text += f", an {USUAL_CARD} would take about {about(with_card.seconds)}"
    size = f"{smaller.height}x{smaller.width} with {smaller.frames} frames"
    return f"{text}; without a card make a smaller one: {size} would take about {about(smaller_plan.seconds)}"


def about(seconds: float) -> str:
    """A duration rounded to hours, minutes or seconds."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
