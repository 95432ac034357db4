"""Reads a made clip: which of all drawn clips is nearest to it."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from skyrun.demo.words import COLOURS, MOTIONS, SHAPES, Topic
from skyrun.demo.world import Picture, composed
from training.clips import PLACES, path

Floats = NDArray[np.float32]


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
    """Error, colour, shape and motion of the nearest clip with that motion."""
    paths = [path(motion, scene.shape[:2], length, place)[:, list(times)] for place in PLACES]
    return min(
        (error, colour, shape, motion)
        for place, shape in product(paths, SHAPES)
        for error, colour in _errors(frames, scene, shape, place)
    )


def _errors(frames: Picture, scene: Picture, shape: str, place: Floats) -> Iterator[tuple[float, str]]:
    """The mean squared error and name of each colour. A drawn clip is linear in it, so two clips give all."""
    black, white = (composed(shape, [level] * 3, scene, *place) for level in (0, 1))
    for name, colour in COLOURS.items():
        made = black + (white - black) * (np.asarray(colour, np.float32) / 255)
        yield float(np.square(made - frames).mean()), name
