"""Read pieces of files into buffers of one's own: a mapping would keep every page it touched in memory."""

import io
from pathlib import Path

from skyrun.kernels.errors import FAILED, SkyrunError


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
    try:
        file.seek(offset)
        done = 0
        while done < len(buffer):
            got = file.readinto(buffer[done:])
            if not got:
                raise SkyrunError(
                    f"{file.name} ended at byte {offset + done}, expected {len(buffer) - done} more",
                    "the file was cut or replaced while it was read: restore it and run again",
                    code=FAILED,
                )
            done += got
    except OSError as error:
        raise SkyrunError(f"cannot read {file.name}: {error}", "check the disk and the file", code=FAILED) from error
