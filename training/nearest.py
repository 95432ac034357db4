"""Reads a made clip: which of all drawn clips is nearest to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from skyrun.demo.world import COLOURS, MOTIONS, SHAPES, Picture, Topic, composed
from training.clips import path

Floats = NDArray[np.float32]
_COARSE = (-1.0, -0.5, 0.0, 0.5, 1.0)
_FINER = (0.25, 0.12)  # steps by which the nearest place is refined
_REFINED = 3  # motions whose place is refined


@dataclass(frozen=True, order=True)
class _Found:
    """A drawn clip, and its squared error. right, down: where the sprite is, as for `path`."""

    error: float
    colour: str
    shape: str
    motion: str
    right: float
    down: float


def nearest(frames: Picture, scene: Picture, name: str, times: Sequence[int], length: int) -> Topic:
    """The topic of the drawn clip with the least squared error, of every colour, shape, motion and open place.

    The place is found with every motion, shape and colour on a coarse grid in pictures of half the size, and refined
    for the nearest motions.

    Args:
        frames: of the made clip [T, H, W, 3] in 0 to 1.
        scene: the picture it is set in [H, W, 3].
        name: of the scene.
        times: which frames of the clip these are.
        length: frames of the whole clip.
    """
    size = scene.shape[:2]

    def least(motion: str, places: Sequence[tuple[float, float]], scale: int = 1) -> _Found:
        wanted, ground = _reduced(frames, scale), _reduced(scene, scale)
        paths = np.stack([path(motion, size, length, *place)[:, list(times)] for place in places], 1)
        paths[:3] /= scale  # x, y and radius
        found = []
        for shape in SHAPES:
            errors = _errors(wanted, ground, shape, paths)
            number, colour = np.unravel_index(errors.argmin(), errors.shape)
            found.append(_Found(errors[number, colour], tuple(COLOURS)[colour], shape, motion, *places[number]))
        return min(found)

    grid = list(product(_COARSE, _COARSE))
    coarse = [least(motion, [place for place in grid if _matters(motion, *place)], 2) for motion in MOTIONS]
    refined = []
    for best in sorted(coarse)[:_REFINED]:
        for step in _FINER:
            centre = best.right, best.down
            around = [(best.right + a * step, best.down + b * step) for a, b in product((-1, 0, 1), repeat=2)]
            best = least(best.motion, [place for place in around if _matters(best.motion, *place, centre=centre)])
        refined.append(best)
    best = min(refined)
    return Topic(best.colour, best.shape, best.motion, name)


def _reduced(pictures: Picture, scale: int) -> Picture:
    """Pictures [..., H, W, 3] of which each `scale` x `scale` pixels are one."""
    *rest, rows, columns, channels = pictures.shape
    return pictures.reshape(*rest, rows // scale, scale, columns // scale, scale, channels).mean((-4, -2))


def _errors(frames: Picture, scene: Picture, shape: str, paths: Floats) -> Floats:
    """The squared error of drawn clips by path and colour. paths: x, y, radius and angle, [4, paths, T].

    A clip is linear in the sprite's colour, so that two of them give those of all colours.
    """
    count = paths.shape[1]
    black, white = (composed(shape, [level] * 3, scene, *paths.reshape(4, -1)) for level in (0, 1))
    gain = (white - black).reshape(count, -1, 3)
    rest = (black.reshape(count, *frames.shape) - frames).reshape(count, -1, 3)
    pairs = ((gain, gain), (gain, rest), (rest, rest))
    squares, products, plain = (np.einsum("pnc,pnc->pc", a, b)[:, None] for a, b in pairs)
    levels = np.asarray(list(COLOURS.values()), np.float32) / 255
    return (levels**2 * squares + 2 * levels * products + plain).sum(2)


def _matters(motion: str, right: float, down: float, centre: tuple[float, float] = (0.0, 0.0)) -> bool:
    """Whether the place differs from the centre only where the motion leaves it open."""
    if motion in ("right", "left"):
        return right == centre[0]
    if motion in ("up", "down", "bounce"):
        return down == centre[1]
    return True
