"""Clips of the small model's world, drawn at random: a topic, its prompt, its references and its frames."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import product

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from skyrun.demo.words import COLOURS, MOTIONS, SCENES, SHAPES, Topic
from skyrun.demo.world import RADIUS, Picture, Size, composed, middle, scene_picture, sentence, sprite_picture, tint
from skyrun.tasks.windows import FRAMES_PER_LATENT

SIZES: tuple[Size, ...] = ((48, 48), (64, 64), (48, 80))
USUAL_SIZE = 48, 80
LEAST, USUAL, MOST = 9, 17, 33  # frames of a clip
PLACES = (-1, 0, 1)  # that a prompt leaves open: tokens (16 pixels) from the middle, across the motion
SHARES = (0.2, 0.6, 0.2)  # of clips at each of them
_FAR = 2  # latents from the middle, where motions begin and end
_PIXELS = 8  # of a latent
_PICTURE_RADIUS = (
    0.23  # of sprites that the autoencoder sees, as a share of the shorter side: it has to know many sizes
)

Floats = NDArray[np.float32]
TOPICS = tuple(
    Topic(colour, shape, motion, scene)
    for colour, shape, motion, scene in product(COLOURS, SHAPES, MOTIONS, SCENES)
    if (shape, motion) != ("ball", "spin")  # it would look the same as a ball that stays still
)


def _shuffled(topic: Topic) -> int:
    return zlib.crc32(" ".join(astuple(topic)).encode())


HELD_OUT = frozenset(sorted(TOPICS, key=_shuffled)[: len(TOPICS) // 10])  # a tenth that training never shows
TRAINED = tuple(topic for topic in TOPICS if topic not in HELD_OUT)


@dataclass(frozen=True)
class Clip:
    """A drawn clip. references: one or two pictures [H, W, 3]; frames: [T, H, W, 3]; all in 0 to 1."""

    topic: Topic
    prompt: str
    references: list[Picture]
    frames: Picture


def draw_clip(
    topic: Topic, size: Size, frames: int, draw: Generator, step: int = 1, shares: Sequence[float] = SHARES
) -> Clip:
    """A clip of the topic at a place that is drawn with these shares; of its frames only each `step`-th is drawn."""
    colour, scene = tint(topic.colour, draw), scene_picture(topic.scene, size, draw)
    place = path(topic.motion, size, frames, int(draw.choice(PLACES, p=shares)))
    references = [sprite_picture(topic.shape, colour, size)] + ([] if topic.scene == "white" else [scene])
    shown = composed(topic.shape, colour, scene, *place[:, ::step])
    return Clip(topic, sentence(topic, draw), references, shown)


def path(motion: str, size: Size, frames: int, place: int) -> Floats:
    """x, y, radius and angle of the sprite in every frame, [4, frames]. A longer clip ends as a shorter one.

    The model learns where a frame is by its distance in time from the references, which follow the last frame; so
    everything here is counted from the end. In the frames that are a latent frame's last the sprite is whole latents
    away from the middle, so that its latents are those of the reference, moved.

    Args:
        motion: one of MOTIONS.
        size: of the picture.
        frames: how many.
        place: one of PLACES: how far below the middle a sprite moves to the side, and how far to the right of it any
            other is.
    """
    rows, columns = size
    left = np.arange(frames - 1, -1, -1) / FRAMES_PER_LATENT  # latents until the end
    gone = np.maximum(2 * _FAR - left, 0)  # latents from the start; before that it rests
    x, y = np.full(frames, 2.0 * place), np.zeros(frames)
    r, angle = np.full(frames, RADIUS), np.zeros(frames)
    if motion in ("right", "left"):
        x, y = ((gone - _FAR) if motion == "right" else (_FAR - gone)), x
    elif motion in ("down", "up"):
        y = (gone - _FAR) if motion == "down" else (_FAR - gone)
    elif motion == "bounce":
        share = left / (2 * _FAR) % 1
        y = _FAR - 8 * _FAR * share * (1 - share)
    elif motion == "grow":
        r = RADIUS * (0.5 + 0.2 * gone)
    elif motion == "shrink":
        r = RADIUS * (1.3 - 0.2 * gone)
    elif motion == "spin":
        angle = -math.pi / 4 * left
    return np.stack((middle(columns) + _PIXELS * x, middle(rows) + _PIXELS * y, r, angle)).astype(np.float32)


def draw_pictures(size: Size, count: int, draw: Generator) -> Picture:
    """Single pictures [count, H, W, 3] for the autoencoder: references and frames, with sprites anywhere."""
    rows, columns = size
    rest, white = _PICTURE_RADIUS * min(size), np.ones((*size, 3), np.float32)
    pictures = np.empty((count, *size, 3), np.float32)
    for index in range(count):
        topic = TOPICS[draw.integers(len(TOPICS))]
        colour, scene = tint(topic.colour, draw), scene_picture(topic.scene, size, draw)
        kind = draw.random()
        if kind < 0.12:
            pictures[index] = scene
        elif kind < 0.24:
            pictures[index] = composed(topic.shape, colour, white, [middle(columns)], [middle(rows)], [rest], [0])[0]
        else:
            r = rest * (draw.uniform(0.5, 1.35) if draw.random() < 0.4 else 1)
            angle = draw.uniform(0, 2 * math.pi) if draw.random() < 0.3 else 0
            x, y = draw.uniform(r, columns - r), draw.uniform(r, rows - r)
            pictures[index] = composed(topic.shape, colour, scene, [x], [y], [r], [angle])[0]
    return pictures
