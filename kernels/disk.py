"""What already exists on disk: the nearest existing folder of a path, and the bytes that a file occupies."""

from pathlib import Path


def existing_folder(path: Path) -> Path:
    """The path itself if it exists, else its nearest parent that does."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def allocated(path: Path) -> int:
    """Bytes that a file occupies on disk, which may be less than its size if it has holes; 0 if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return min(status.st_size, getattr(status, "st_blocks", 0) * 512)
