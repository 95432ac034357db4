"""Find what fits if a clip does not: a lower resolution, or fewer frames."""

from collections.abc import Callable
from dataclasses import replace

from skyrun.presets.workload import Workload

_GRID = 16
_SMALLEST, _FEWEST = 256 * 448, 25  # pixels, and frames: a second


def what_fits(workload: Workload, fits: Callable[[Workload], bool]) -> str:
    """A sentence that names a smaller size, fewer frames, or both; empty if nothing smaller fits."""
    size, frames = largest_size(workload, fits), most_frames(workload, fits)
    fitting = [size] * bool(size) + [f"{frames} frames"] * bool(frames)
    return f"{' or '.join(fitting)} would fit" if fitting else ""


def largest_size(workload: Workload, fits: Callable[[Workload], bool]) -> str:
    """The largest smaller resolution that fits, by name or as height x width; empty if none fits."""
    for name, area in workload.areas:
        if area < _area(workload) and fits(_scaled(workload, area)):
            return name
    smallest = _scaled(workload, _SMALLEST)
    return f"{smallest.height}x{smallest.width}" if _area(workload) > _SMALLEST and fits(smallest) else ""


def smallest(workload: Workload) -> Workload:
    """A small clip of one second, or of the workload's length if it is made in windows."""
    small = _scaled(workload, min(_SMALLEST, _area(workload)))
    return small if workload.windowed or workload.frames <= _FEWEST else _shorter(small, _FEWEST)


def _area(workload: Workload) -> int:
    return workload.height * workload.width


def _scaled(workload: Workload, area: int) -> Workload:
    """The workload with the same aspect ratio and about `area` pixels."""
    scale = (area / _area(workload)) ** 0.5
    height, width = (max(1, round(side * scale / _GRID)) * _GRID for side in (workload.height, workload.width))
    return replace(workload, height=height, width=width)


def most_frames(workload: Workload, fits: Callable[[Workload], bool]) -> int:
    """The most frames that fit, fewer than the workload has; 0 if none fit.

    0 also for a clip that is made in windows: its length does not change how much memory it takes.
    """
    if workload.windowed:
        return 0
    low, high = 0, (workload.frames - 1) // 4  # latent frames after the first hold four frames each
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
