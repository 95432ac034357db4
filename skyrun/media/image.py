"""The only place that opens and writes image files. Nothing here imports torch."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.files.atomic import replacing

_WRITTEN = (".png", ".jpg", ".jpeg", ".webp")
# Pillow reads forty more; for EPS it would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
_MOST_PIXELS = 64_000_000  # converting such an image to RGB takes about 1 GB

# Some programs write megabytes of settings into PNG files. The total stays limited.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def suffix_problems(path: Path) -> list[str]:
    """Why an image cannot be written under that name."""
    return [] if path.suffix.lower() in _WRITTEN else [f"{path} does not end in {', '.join(_WRITTEN)}"]


def open_image(path: Path) -> Image.Image:
    """Open an image as RGB, rotated upright, without its alpha channel, as upstream does.

    Raises SkyrunError if it is not an image that can be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged tags, and about sizes that are checked here
            with Image.open(path, formats=_FORMATS) as image:
                _check_size(image, path)
                return _eight_bits(_upright(image), path).convert("RGB")
    except SkyrunError:
        raise
    except FileNotFoundError as error:
        raise SkyrunError(f"{path} does not exist", "check the path given to --image") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        hint = "scale it down; a few megapixels are enough"
        raise SkyrunError(f"{path} is too large an image: {error}", hint) from error
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        raise SkyrunError(f"{path} is not a readable image: {error}", "use a PNG, JPEG or WebP file") from error


def image_format(path: Path) -> str:
    """The format of an image that `open_image` has read, such as "png"."""
    with Image.open(path, formats=_FORMATS) as image:
        return str(image.format).lower()


def _check_size(image: Image.Image, path: Path) -> None:
    if image.width * image.height > _MOST_PIXELS:
        image.draft("RGB", (image.width // 2, image.height // 2))  # a JPEG decoder can scale the image down
    if image.width * image.height > _MOST_PIXELS:
        got = f"{image.width} x {image.height}, {image.width * image.height / 1e6:.0f} million pixels"
        hint = "scale it down; a few megapixels are enough"
        raise SkyrunError(f"{path} has {got}, expected at most {_MOST_PIXELS // 10**6} million", hint)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged tag; the image itself was read
        return image


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Convert 16-bit gray to 8 bits. Pillow would clip it to white."""
    if image.mode.startswith("I"):
        levels = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise SkyrunError(f"{path} has floating-point pixels", "save it with 8 bits per channel")
    return image


def write_animation(path: Path, images: Sequence[Image.Image], seconds: float) -> None:
    """Write images of one size as an endless WebP, atomically. Raises SkyrunError if it cannot be written.

    Args:
        path: Where to write it.
        images: Its frames.
        seconds: How long each is shown.
    """
    first, *others = images
    try:
        with replacing(path) as partial:
            options = {"save_all": True, "append_images": others, "duration": round(1000 * seconds), "loop": 0}
            first.save(partial, format="WEBP", quality=75, method=2, **options)
    except (OSError, ValueError) as error:
        raise SkyrunError(f"cannot write {path}: {error}", "check free space and permissions", FAILED) from error


def write_image(path: Path, image: Image.Image) -> None:
    """Write an image atomically. Raises SkyrunError if it cannot be written."""
    try:
        with replacing(path) as partial:
            image.save(partial, format=Image.registered_extensions()[path.suffix.lower()], optimize=True)
    except (OSError, ValueError) as error:
        raise SkyrunError(f"cannot write {path}: {error}", "check free space and permissions", FAILED) from error
