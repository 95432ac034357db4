"""What exists on disk and what can: the nearest folder of a path, the bytes of a file, and which paths are possible."""

import os
from pathlib import Path

_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes


def is_possible(path: Path) -> bool:
    """Whether file systems may have such a path. Of others they do not say that nothing is there: they raise errors."""
    try:
        parts = [os.fsencode(part) for part in path.parts]
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return (
        b"\0" not in b"".join(parts)
        and max(map(len, parts), default=0) <= _LONGEST_NAME
        and (sum(map(len, parts)) + len(parts) <= _LONGEST_PATH)
    )


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
