"""Pictures of the small model's world, drawn.

Pictures are float32 [H, W, 3] in 0 to 1. A sprite's place, radius and angle are in pixels and radians.
"""

import math
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from skyrun.demo.words import COLOURS, MOTIONS, SCENES, Topic

Picture = NDArray[np.float32]
Size = tuple[int, int]  # height and width in pixels

RADIUS = 11.0  # of a sprite at rest, in pixels
_TOKEN = 16  # pixels of a side
_SOFT = 0.8  # half the width in pixels over which an edge fades


def sentence(topic: Topic, draw: Generator) -> str:
    """A prompt for the topic in one of its phrasings, such as "A red star goes right by the sea."."""
    motion = MOTIONS[topic.motion][draw.integers(len(MOTIONS[topic.motion]))]
    place = SCENES[topic.scene][draw.integers(len(SCENES[topic.scene]))]
    article = "the" if draw.random() < 0.3 else "an" if topic.colour == "orange" else "a"
    words = f"{article} {topic.colour} {topic.shape} {motion} {place}"
    if draw.random() < 0.5:
        words = words[0].upper() + words[1:]
    return words + ("." if draw.random() < 0.5 else "")


def tint(colour: str, draw: Generator) -> Picture:
    """The colour [3], a little different each time."""
    shade: Picture = np.clip(np.asarray(COLOURS[colour]) + draw.uniform(-12, 12, 3), 0, 255).astype(np.float32)
    return shade / np.float32(255)


def middle(side: int) -> int:
    """Where a sprite rests, in pixels: in the middle of the token that is nearest to the middle of the picture.

    It is the same part of a token in pictures of every size, so a model has to learn to move a sprite only once.
    """
    return _TOKEN * (side // _TOKEN // 2) + _TOKEN // 2


def sprite_picture(shape: str, colour: ArrayLike, size: Size) -> Picture:
    """The first reference: the sprite at rest, in the middle of a white picture."""
    rows, columns = size
    white = np.ones((*size, 3), np.float32)
    picture: Picture = composed(shape, colour, white, [middle(columns)], [middle(rows)], [RADIUS], [0])[0]
    return picture


def composed(
    shape: str, colour: ArrayLike, scene: Picture, x: ArrayLike, y: ArrayLike, r: ArrayLike, angle: ArrayLike
) -> Picture:
    """Frames [T, H, W, 3] of the sprite before the scene [H, W, 3]; place, radius and angle [T] each."""
    shown, cover = _sprite(shape, colour, scene.shape[:2], x, y, r, angle)
    frames: Picture = (shown * cover + scene * (1 - cover)).astype(np.float32)
    return frames


def scene_picture(scene: str, size: Size, draw: Generator) -> Picture:
    """The second reference: a scene whose shades, horizon and waves are drawn at random."""
    rows, columns = size
    y, x = _grid(size)
    horizon: Any = rows * draw.uniform(0.5, 0.68)
    above, below = y / horizon, (y - horizon) / (rows - horizon)

    def shade(colour: tuple[int, int, int], width: float = 14) -> Any:
        return np.clip(np.asarray(colour, np.float32) + draw.uniform(-width, width, 3), 0, 255) / 255

    if scene == "white":
        return np.ones((*size, 3), np.float32)
    if scene == "sea":
        sky = _fade(shade((120, 185, 240)), shade((225, 240, 250)), above)
        waves = 0.5 + 0.5 * np.sin(0.8 * y + np.sin(0.25 * x + draw.uniform(0, 2 * math.pi)))
        ground = _fade(shade((28, 95, 165)), shade((50, 125, 190)), waves)
    elif scene == "grass":
        sky = _fade(shade((130, 200, 250)), shade((235, 245, 255)), above)
        ground = _fade(shade((110, 190, 80)), shade((50, 120, 40)), below)
    elif scene == "desert":
        sky = _fade(shade((250, 170, 90)), shade((255, 225, 170)), above)
        horizon = horizon + 3 * np.sin(x * draw.uniform(0.08, 0.14) + draw.uniform(0, 2 * math.pi))
        ground = _fade(shade((225, 190, 120)), shade((180, 130, 70)), below)
    else:
        sky = _fade(shade((45, 45, 115), 8), shade((100, 90, 170), 8), above)
        moon = np.hypot(x - draw.uniform(0.15, 0.85) * columns, y - draw.uniform(0.13, 0.2) * rows)
        sky = _fade(sky, shade((240, 235, 205), 5), _inside(moon - 0.08 * min(size)))
        ground = _fade(shade((60, 70, 100), 8), shade((45, 50, 75), 8), below)
    picture: Picture = _fade(ground, sky, _inside(y - horizon)).astype(np.float32)
    return picture


def _grid(size: Size) -> tuple[Picture, Picture]:
    """y and x of the pixels' middles, [H, W] each."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32) + 0.5
    return y, x


def _inside(distance: ArrayLike) -> Any:
    """1 within an edge, 0 outside of it, by the signed distance in pixels."""
    return np.clip(0.5 - np.asarray(distance, np.float32) / (2 * _SOFT), 0, 1)


def _fade(start: Any, end: Any, share: ArrayLike) -> Any:
    part = np.clip(np.asarray(share, np.float32), 0, 1)[..., None]
    return start * (1 - part) + end * part


def _sprite(
    shape: str, colour: ArrayLike, size: Size, x: ArrayLike, y: ArrayLike, r: ArrayLike, angle: ArrayLike
) -> tuple[Any, Any]:
    """Colours [T, H, W, 3] and cover [T, H, W, 1] of a sprite with a darker rim."""
    right, down, radius, turn = (np.asarray(value, np.float32).reshape(-1, 1, 1) for value in (x, y, r, angle))
    rows, columns = _grid(size)
    dx, dy = (columns - right) / radius, (rows - down) / radius
    u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    edge = _edge(shape, u, v)
    paint = np.asarray(colour, np.float32)
    shown = _fade(0.45 * paint, paint, _inside((edge + 0.16) * radius))
    if shape == "ball":
        shown = _fade(shown, 0.25 * paint + 0.75, _inside((np.hypot(u + 0.35, v + 0.38) - 0.25) * radius))
    if shape == "face":
        for side in (-0.38, 0.38):
            shown = _fade(shown, 0.06 * np.ones(3), _inside((np.hypot(u - side, v + 0.26) - 0.19) * radius))
        smile = _inside((np.abs(np.hypot(u, v - 0.02) - 0.56) - 0.12) * radius) * _inside((0.2 - v) * radius)
        shown = _fade(shown, 0.06 * np.ones(3), smile)
    return shown, _inside(edge * radius)[..., None]


def _edge(shape: str, u: Any, v: Any) -> Any:
    """The signed distance to the shape's edge, in radii; negative within."""
    if shape in ("ball", "face"):
        return np.hypot(u, v) - 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.85
    if shape == "triangle":
        return np.maximum(math.sqrt(0.75) * np.abs(u) - 0.5 * (v + 1), v - 0.7)
    tip, notch, half = 1.1, 0.5, math.pi / 5  # of the star: both radii, and half the angle between two tips
    turn = np.abs(np.mod(np.arctan2(u, -v) + half, 2 * half) - half)
    length = np.hypot(u, v)
    along, across = length * np.cos(turn) - tip, length * np.sin(turn)
    to_along, to_across = notch * math.cos(half) - tip, notch * math.sin(half)
    return (along * to_across - across * to_along) / math.hypot(to_along, to_across)
