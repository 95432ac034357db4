"""What would fit where a clip does not: a smaller picture, or fewer frames."""

from collections.abc import Callable
from dataclasses import replace

from skyrun.presets.workload import Workload

_GRID = 16
_SMALLEST, _FEWEST = 256 * 448, 25  # pixels, and frames: a second


def what_fits(workload: Workload, fits: Callable[[Workload], bool]) -> str:
    """In words; empty if nothing smaller fits."""
    size, frames = largest_size(workload, fits), most_frames(workload, fits)
    ways = [size] * bool(size) + [f"{frames} frames"] * bool(frames)
    return f"{' or '.join(ways)} would fit" if ways else ""


def largest_size(workload: Workload, fits: Callable[[Workload], bool]) -> str:
    """A resolution below the workload's, or height x width; empty if none fits."""
    for name, area in workload.areas:
        if area < _area(workload) and fits(_scaled(workload, area)):
            return name
    smallest = _scaled(workload, _SMALLEST)
    return f"{smallest.height}x{smallest.width}" if _area(workload) > _SMALLEST and fits(smallest) else ""


def smallest(workload: Workload) -> Workload:
    """A small picture for a second, or as long as the clip is where windows make it."""
    small = _scaled(workload, min(_SMALLEST, _area(workload)))
    return small if workload.windowed or workload.frames <= _FEWEST else _shorter(small, _FEWEST)


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
    if workload.windowed:
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
