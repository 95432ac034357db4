"""Convert images to tensors and tensors to frames, and scale and crop images, exactly as upstream does."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Frames = NDArray[np.uint8]  # [T, H, W, 3]
_GRID = 16  # to which the sides of clips are rounded


def letterbox(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale an image to fit height x width without cropping, centered on white.

    Args:
        image: The image.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
    """
    ratio = image.width / image.height
    # Each side is rounded down from the ratio itself: a common scale factor makes some sizes one pixel too small.
    fit = (width, int(width / ratio)) if ratio > width / height else (int(height * ratio), height)
    fit = max(fit[0], 1), max(fit[1], 1)
    # Width before height, explicitly: Pillow 13 orders the two passes by the image's shape, which changes pixels.
    scaled = image.resize((fit[0], image.height), Image.Resampling.LANCZOS).resize(fit, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(scaled, ((width - fit[0]) // 2, (height - fit[1]) // 2))
    return canvas


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image -> float32 [3, 1, H, W] in [-1, 1], a video of one frame."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return (2 * pixels - 1).permute(2, 0, 1).unsqueeze(1)


def to_uint8(pixels: Tensor) -> Frames:
    """Pixels [3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3], rounded to nearest even as upstream does."""
    return _as_frames(_levels(pixels).round())


def crop_portrait(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale an image to cover height x width, and crop its center. Sizes are rounded as upstream rounds them.

    Args:
        image: The image.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
    """
    scale = max(height / image.height, width / image.width)
    rows, cols = math.ceil(scale * image.height), math.ceil(scale * image.width)
    # Width before height, as in `letterbox`.
    scaled = image.resize((cols, image.height), Image.Resampling.BILINEAR)
    scaled = scaled.resize((cols, rows), Image.Resampling.BILINEAR)
    top, left = round((rows - height) / 2), round((cols - width) / 2)
    return scaled.crop((left, top, left + width, top + height))


def first_frame(image: Image.Image, height: int, width: int, fit: str) -> tuple[Tensor, Tensor]:
    """The first frame of a clip, [3, 1, height, width] in [-1, 1], and the image that CLIP sees, [3, H, W].

    "lanczos" and "bicubic" crop the image to the clip's shape and scale it so, as SkyReels-V2 does; CLIP sees the
    result. "whole" scales the whole image, as Wan does, and CLIP sees it in its own size.

    Args:
        image: The image.
        height: Height of the clip in pixels.
        width: Width of the clip in pixels.
        fit: One of these. An image of quite another shape is cropped in any case.
    """
    whole = fit == "whole"
    over = max(height / image.height, width / image.width)
    if not whole or max(over * image.height - height, over * image.width - width) >= _GRID:
        image = _cropped_to_shape(image, height, width)
    if whole:
        pixels = to_pixels(image).movedim(1, 0)
        return F.interpolate(pixels, (height, width), mode="bicubic").movedim(0, 1), pixels[0]
    how = Image.Resampling[fit.upper()]
    frame = to_pixels(image.resize((width, image.height), how).resize((width, height), how))  # as in `letterbox`
    return frame, frame[:, 0]


def _cropped_to_shape(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest part around the middle of an image that has the shape of height x width, rounded as upstream does."""
    cols, rows = image.width, image.height
    if rows / cols > height / width:
        rows = int(cols * height / width)
    else:
        cols = int(rows * width / height)
    left, top, right, bottom = (
        round(side)
        for side in (
            (image.width - cols) / 2,
            (image.height - rows) / 2,
            (image.width + cols) / 2,
            (image.height + rows) / 2,
        )
    )
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def truncated(pixels: Tensor) -> Frames:
    """Pixels [3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3], rounded down as the other tasks do."""
    return _as_frames(_levels(pixels))


def _levels(pixels: Tensor) -> Tensor:
    return (pixels / 2 + 0.5).clamp(0, 1) * 255


def _as_frames(levels: Tensor) -> Frames:
    frames: Frames = levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return frames


def from_uint8(frames: Frames) -> Tensor:
    """uint8 [T, H, W, 3] -> pixels [3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
