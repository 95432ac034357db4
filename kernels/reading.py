"""Read pieces of files into buffers of one's own: a mapping would keep every page it touched in memory."""

import io
from collections.abc import Callable
from pathlib import Path

from skyrun.kernels.errors import FAILED, SkyrunError

# Reads into a buffer from a byte of a file on, at most as much as fits; returns how many bytes it got, 0 at the end.
ReadAt = Callable[[memoryview, int], int]


def open_unbuffered(path: Path) -> io.FileIO:
    """The file, for reading into buffers of one's own. SkyrunError if it has gone."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise SkyrunError(
            f"cannot read {path}: {error}", "it was there before: restore it and run again", FAILED
        ) from error


def read_into(file: io.FileIO, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from byte `offset` of an unbuffered file, or raise SkyrunError."""
    fill(buffer, offset, read_at(file), str(file.name))


def read_at(file: io.FileIO) -> ReadAt:
    """Reads of a file that no other thread uses."""

    def read(buffer: memoryview, offset: int) -> int:
        file.seek(offset)
        return file.readinto(buffer) or 0

    return read


def fill(buffer: memoryview, offset: int, read: ReadAt, name: str) -> None:
    """Fill the buffer from byte `offset` of the file `name`, in as many reads as it takes, or raise SkyrunError."""
    try:
        done = 0
        while done < len(buffer):
            got = read(buffer[done:], offset + done)
            if not got:
                raise SkyrunError(
                    f"{name} ended at byte {offset + done}, expected {len(buffer) - done} more",
                    "the file was cut or replaced while it was read: restore it and run again",
                    code=FAILED,
                )
            done += got
    except OSError as error:
        raise SkyrunError(f"cannot read {name}: {error}", "check the disk and the file", code=FAILED) from error
