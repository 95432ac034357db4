"""What would fit where a clip does not: a smaller picture, or fewer frames."""

from collections.abc import Callable
from dataclasses import replace

from skyrun.presets.workload import Workload

_GRID = 16
_AREAS = {"540P": 544 * 960, "480P": 480 * 848}
_SMALLEST = 256 * 448


def what_fits(workload: Workload, fits: Callable[[Workload], bool]) -> str:
    """In words; empty if nothing smaller fits."""
    size, frames = largest_size(workload, fits), most_frames(workload, fits)
    ways = [size] * bool(size) + [f"{frames} frames"] * bool(frames)
    return f"{' or '.join(ways)} would fit" if ways else ""


def largest_size(workload: Workload, fits: Callable[[Workload], bool]) -> str:
    """A resolution below the workload's, or height x width; empty if none fits."""
    areas = {name: area for name, area in _AREAS.items() if (workload.task, name) != ("a2v", "540P")}
    for name, area in areas.items():
        if area < _area(workload) and fits(_scaled(workload, area)):
            return name
    smallest = _scaled(workload, _SMALLEST)
    return f"{smallest.height}x{smallest.width}" if _area(workload) > _SMALLEST and fits(smallest) else ""


def _area(workload: Workload) -> int:
    return workload.height * workload.width


def _scaled(workload: Workload, area: int) -> Workload:
    """A picture of the same shape and about that many pixels."""
    scale = (area / _area(workload)) ** 0.5
    height, width = (max(1, round(side * scale / _GRID)) * _GRID for side in (workload.height, workload.width))
    return replace(workload, height=height, width=width)


def most_frames(workload: Workload, fits: Callable[[Workload], bool]) -> int:
    """The most frames that fit, 0 if not even one does: a group of four frames is one latent frame.

    Of a clip made in windows the length does not matter.
    """
    if workload.task in ("v2v", "a2v"):
        return 0
    low, high = 0, (workload.frames - 1) // 4
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(_shorter(workload, 4 * middle + 1)) else (low, middle - 1)
    frames = 4 * low + 1
    return frames if frames < workload.frames and fits(_shorter(workload, frames)) else 0


def _shorter(workload: Workload, frames: int) -> Workload:
    return replace(
        workload,
        frames=frames,
        latent_frames=workload.latent_frames - (workload.frames - frames) // 4,
        decoded_frames=0,
    )
