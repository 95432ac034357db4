"""The default calibration set: diverse prompts and drawn images."""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

# They differ in subject, light, distance, speed, camera and length, in the two languages that the models read: the
# importance of a channel shows only in clips that use it.
PROMPTS = (
    "A young woman in a red coat walks through falling snow at dusk, turns to the camera and smiles. Close-up, shallow "
    "depth of field, soft warm light from shop windows behind her.",
    "A golden retriever races along a wet beach after a ball, splashing water, low tracking shot, bright midday sun.",
    "An elderly craftsman planes a plank in a dusty workshop; shavings curl to the floor. Static camera, side light.",
    "Aerial view of a winding mountain road in autumn, a single white car, clouds drifting over the ridges, slow pan.",
    "一位老人和一个小女孩坐在湖边的长椅上聊天，身后是盛开的樱花，微风吹过，花瓣飘落，镜头缓缓推进。",
    "Two dancers spin under neon signs on a rainy street at night, reflections on the asphalt, handheld camera, fast.",
    "Macro shot of coffee being poured into a glass cup on a marble table, steam rising, plain grey background.",
    "Anime style: a small robot waters plants on a rooftop garden above a crowded city, pastel colours.",
)

# Size and steps are those of real clips, because activations depend on both. Clips are shorter than real ones: five
# latent frames show motion and, with the references, are 14 k tokens at 480P; eight clips of eight steps feed a weight
# 0.9 M rows.
FRAMES = 17

_SIZES = ((480, 640), (640, 480), (512, 512), (704, 396))  # width, height: upright, wide, square and 16:9


def draw_images(folder: Path) -> tuple[Path, ...]:
    """Draw four images as PNG: a figure in a landscape, each with its own shape, colors and place."""
    paths = []
    for number, size in enumerate(_SIZES):
        paths.append(folder / f"reference-{number}.png")
        _scene(random.Random(number), *size).save(paths[-1])
    return tuple(paths)


def _scene(chance: random.Random, width: int, height: int) -> Image.Image:
    """Draw sky, ground with a texture, a sun and a figure."""
    image = Image.new("RGB", (width, height))
    canvas = ImageDraw.Draw(image)
    top, bottom = (tuple(chance.randrange(256) for _ in range(3)) for _ in range(2))
    for row in range(height):
        mixed = [round(a + (b - a) * row / height) for a, b in zip(top, bottom, strict=True)]
        canvas.line((0, row, width, row), fill=(mixed[0], mixed[1], mixed[2]))
    horizon, colors = height * 2 // 3, [tuple(chance.randrange(256) for _ in range(3)) for _ in range(5)]
    canvas.rectangle((0, horizon, width, height), fill=colors[0])
    for x in range(0, width, 8):
        canvas.line((x, horizon, x + 40 * math.sin(x), height), fill=colors[1], width=chance.randrange(1, 4))
    sun, radius = chance.randrange(width), height // 12
    canvas.ellipse((sun - radius, radius, sun + radius, 3 * radius), fill=colors[2])
    middle, unit = width * chance.uniform(0.3, 0.7), height / 16
    canvas.rounded_rectangle((middle - 2 * unit, 6 * unit, middle + 2 * unit, 15 * unit), 1.5 * unit, fill=colors[3])
    canvas.ellipse((middle - 1.5 * unit, 2.5 * unit, middle + 1.5 * unit, 6 * unit), fill=colors[4])
    for side in (-0.5, 0.5):
        canvas.ellipse((middle + (side - 0.2) * unit, 3.8 * unit, middle + (side + 0.2) * unit, 4.2 * unit), fill=0)
    return image
