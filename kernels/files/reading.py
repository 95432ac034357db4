"""Read parts of files into the caller's buffers. Memory-mapping would keep every page it touches in memory."""

import io
from collections.abc import Callable
from pathlib import Path

from skyrun.kernels.errors import FAILED, SkyrunError

# Reads from a byte offset of a file into a buffer; returns how many bytes it read, 0 at the end of the file.
ReadAt = Callable[[memoryview, int], int]


def open_unbuffered(path: Path) -> io.FileIO:
    """Open a file for unbuffered reading. Raises SkyrunError if it is gone."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise SkyrunError(
            f"cannot read {path}: {error}", "it was there before: restore it and run again", FAILED
        ) from error


def read_into(file: io.FileIO, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from byte `offset` of an unbuffered file. Raises SkyrunError if the file is too short."""
    fill(buffer, offset, read_at(file), str(file.name))


def read_at(file: io.FileIO) -> ReadAt:
    """A ReadAt for a file that no other thread uses: it seeks."""

    def read(buffer: memoryview, offset: int) -> int:
        file.seek(offset)
        return file.readinto(buffer) or 0

    return read


def fill(buffer: memoryview, offset: int, read: ReadAt, name: str) -> None:
    """Fill the buffer with as many reads as it takes.

    Args:
        buffer: what is filled.
        offset: the first byte of the file to read.
        read: reads from the file.
        name: the file, named in the error.

    Raises SkyrunError if the file ends too early or cannot be read.
    """
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
