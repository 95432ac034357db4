"""Reads a made clip: which of all drawn clips is nearest to it."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from skyrun.demo.world import COLOURS, MOTIONS, SHAPES, Picture, Topic, composed
from training.clips import path

Floats = NDArray[np.float32]
_COARSE = (-1.0, -0.5, 0.0, 0.5, 1.0)
_FINER = (0.25, 0.12)  # steps by which the nearest place is refined


def nearest(frames: Picture, scene: Picture, name: str, times: Sequence[int], length: int) -> Topic:
    """The topic of the drawn clip with the least squared error, of every colour, shape, motion and open place.

    Args:
        frames: of the made clip [T, H, W, 3] in 0 to 1.
        scene: the picture it is set in [H, W, 3].
        name: of the scene.
        times: which frames of the clip these are.
        length: frames of the whole clip.
    """
    best = min((_nearest_of(frames, scene, motion, times, length) for motion in MOTIONS), key=lambda found: found[0])
    return Topic(best[1], best[2], best[3], name)


def _nearest_of(
    frames: Picture, scene: Picture, motion: str, times: Sequence[int], length: int
) -> tuple[float, str, str, str]:
    """Error, colour, shape and motion of the nearest clip with that motion.

    The place is found with every shape and colour on a coarse grid and half the rows and columns, then refined.
    """
    size = scene.shape[:2]

    def errors(shape: str, right: float, down: float, every: int = 1) -> Iterator[tuple[float, str, str, float, float]]:
        place = path(motion, size, length, right, down)[:, list(times)]
        # A drawn clip is linear in the sprite's colour, so two of them give all.
        black, white = (composed(shape, [level] * 3, scene, *place)[:, ::every, ::every] for level in (0, 1))
        wanted = frames[:, ::every, ::every]
        for name, colour in COLOURS.items():
            made = black + (white - black) * (np.asarray(colour, np.float32) / 255)
            yield float(np.square(made - wanted).mean()), name, shape, right, down

    grid = [(right, down) for right, down in product(_COARSE, _COARSE) if _matters(motion, right, down)]
    best = min(error for shape in SHAPES for right, down in grid for error in errors(shape, right, down, 2))
    for step in _FINER:
        _, _, _, right, down = best
        around = [(right + a * step, down + b * step) for a, b in product((-1, 0, 1), repeat=2)]
        places = [place for place in around if _matters(motion, *place, centre=(right, down))]
        best = min(error for shape in SHAPES for place in places for error in errors(shape, *place))
    return best[0], best[1], best[2], motion


def _matters(motion: str, right: float, down: float, centre: tuple[float, float] = (0.0, 0.0)) -> bool:
    """Whether the place differs from the centre only where the motion leaves it open."""
    if motion in ("right", "left"):
        return right == centre[0]
    if motion in ("up", "down", "bounce"):
        return down == centre[1]
    return True
