"""Pictures as files. Nothing here imports torch."""

from pathlib import Path

from PIL import Image

from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.atomic import replacing

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def suffix_problems(path: Path) -> list[str]:
    """Why a file of that name cannot be a picture."""
    return [] if path.suffix.lower() in _SUFFIXES else [f"{path} does not end in {', '.join(_SUFFIXES)}"]


def write_picture(path: Path, image: Image.Image) -> None:
    """Save a picture whole or not at all. SkyrunError if it cannot be written."""
    try:
        with replacing(path) as partial:
            image.save(partial, format=Image.registered_extensions()[path.suffix.lower()], optimize=True)
    except (OSError, ValueError) as error:
        raise SkyrunError(f"cannot write {path}: {error}", "check free space and permissions", FAILED) from error
