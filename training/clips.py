"""Clips of the small model's world, drawn at random: a topic, its prompt, its references and its frames."""

import math
import zlib
from dataclasses import astuple, dataclass
from itertools import product

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from skyrun.demo.words import COLOURS, MOTIONS, SCENES, SHAPES, Topic
from skyrun.demo.world import RADIUS, Picture, Size, composed, scene_picture, sentence, sprite_picture, tint

SIZES: tuple[Size, ...] = ((48, 48), (64, 64), (48, 80))
FRAMES = (9, 13, 17, 21, 25, 29, 33)
PLACES = (-1, 0, 1)  # that a prompt leaves open: latents (8 pixels) from the middle, to the right and down
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


def draw_clip(topic: Topic, size: Size, frames: int, draw: Generator, step: int = 1) -> Clip:
    """A clip of the topic; of its frames only each `step`-th is drawn."""
    colour, scene = tint(topic.colour, draw), scene_picture(topic.scene, size, draw)
    place = path(topic.motion, size, frames, *(PLACES[draw.integers(len(PLACES))] for _ in range(2)))
    references = [sprite_picture(topic.shape, colour, size)] + ([] if topic.scene == "white" else [scene])
    shown = composed(topic.shape, colour, scene, *place[:, ::step])
    return Clip(topic, sentence(topic, draw), references, shown)


def path(motion: str, size: Size, frames: int, right: int, down: int) -> Floats:
    """x, y, radius and angle of the sprite in every frame, [4, frames].

    right, down: one of PLACES, where the sprite is as far as the prompt leaves that open.
    """
    rows, columns = size
    share = np.linspace(0, 1, frames)
    x, y = np.full(frames, columns / 2 + _PIXELS * right), np.full(frames, rows / 2 + _PIXELS * down)
    r, angle = np.full(frames, RADIUS), np.zeros(frames)
    if motion in ("right", "left"):
        x = columns / 4 + columns / 2 * (share if motion == "right" else 1 - share)
    elif motion in ("down", "up"):
        y = rows / 4 + rows / 2 * (share if motion == "down" else 1 - share)
    elif motion == "bounce":
        jumps = max(1, round((frames - 1) / 16))
        y = rows * 3 / 4 - rows / 2 * np.abs(np.sin(jumps * math.pi * share))
    elif motion == "grow":
        r = RADIUS * (0.5 + 0.85 * share)
    elif motion == "shrink":
        r = RADIUS * (1.35 - 0.85 * share)
    elif motion == "spin":
        angle = math.pi / 16 * np.arange(frames)
    return np.stack((x, y, r, angle)).astype(np.float32)


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
            pictures[index] = composed(topic.shape, colour, white, [columns / 2], [rows / 2], [rest], [0])[0]
        else:
            r = rest * (draw.uniform(0.5, 1.35) if draw.random() < 0.4 else 1)
            angle = draw.uniform(0, 2 * math.pi) if draw.random() < 0.3 else 0
            x, y = draw.uniform(r, columns - r), draw.uniform(r, rows - r)
            pictures[index] = composed(topic.shape, colour, scene, [x], [y], [r], [angle])[0]
    return pictures
