"""Image files: open upright, write whole. Nothing here imports torch."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.atomic import replacing

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def suffix_problems(path: Path) -> list[str]:
    """Why a file of that name cannot be a picture."""
    return [] if path.suffix.lower() in _SUFFIXES else [f"{path} does not end in {', '.join(_SUFFIXES)}"]


def open_image(path: Path) -> Image.Image:
    """The picture in RGB, upright. An alpha channel is dropped, as upstream does. SkyrunError if it is none."""
    try:
        with Image.open(path) as image:
            return _eight_bits(ImageOps.exif_transpose(image), path).convert("RGB")
    except FileNotFoundError as error:
        raise SkyrunError(f"{path} does not exist", "check the path given to --image") from error
    except Image.DecompressionBombError as error:
        raise SkyrunError(
            f"{path} is too large a picture: {error}", "scale it down; a few megapixels are enough"
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise SkyrunError(f"{path} is not a readable picture: {error}", "use a PNG, JPEG or WebP file") from error


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Sixteen-bit grey to eight bits, which Pillow would clip to white instead."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise SkyrunError(f"{path} is a picture of floating-point numbers", "save it with 8 bits per channel")
    return image


def write_picture(path: Path, image: Image.Image) -> None:
    """Save a picture whole or not at all. SkyrunError if it cannot be written."""
    try:
        with replacing(path) as partial:
            image.save(partial, format=Image.registered_extensions()[path.suffix.lower()], optimize=True)
    except (OSError, ValueError) as error:
        raise SkyrunError(f"cannot write {path}: {error}", "check free space and permissions", FAILED) from error
