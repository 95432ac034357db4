"""What is on a disk already: the part of a path that exists, and the bytes that a file takes."""

from pathlib import Path


def existing_folder(path: Path) -> Path:
    """The path, or the first above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def allocated(path: Path) -> int:
    """Bytes that a file takes on the disk, 0 if there is none; it may have holes."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return min(status.st_size, getattr(status, "st_blocks", 0) * 512)
