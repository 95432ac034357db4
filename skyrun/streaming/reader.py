"""Read a file with several threads in large chunks: a single thread cannot use the full speed of most disks."""

import errno
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from torch import Tensor

from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.files.reading import ReadAt, fill, open_unbuffered, read_at
from skyrun.presets.machine.host import CACHED_SHARE

_THREADS, _CHUNK = 8, 4 << 20
PAGE = 4096  # reads around the page cache begin and end at multiples of it, in the file and in memory
_REFUSED = (errno.EINVAL, errno.ENOTSUP)  # by file systems that have no way around the page cache


@dataclass(frozen=True)
class Extent:
    """A range of bytes in a file and its place in a buffer. file: which of the files that a block is read from."""

    offset: int
    nbytes: int
    at: int
    file: int = 0


class FileReader:
    """Fills buffers from a file.

    A file that fits into free memory is read through the page cache and comes from there when it is read again. Larger
    files are read directly (O_DIRECT), without a copy if buffer and file have the same offset in a page.

    direct: whether to read directly; None decides by the file's size.
    """

    def __init__(self, path: Path, direct: bool | None = None) -> None:
        self._path = path
        self._files = [open_unbuffered(path)]
        self._found = self._identity()
        self._mine = threading.local()
        self._read: ReadAt = self._read_positions if hasattr(os, "preadv") else self._read_own
        if direct is None:
            direct = _exceeds_cache(os.fstat(self._files[0].fileno()).st_size)
        if direct and hasattr(os, "O_DIRECT") and hasattr(os, "preadv"):
            self._open_direct()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"read {path.name}")

    def read(self, extents: Sequence[Extent], buffer: Tensor) -> None:
        """Read extents into a uint8 buffer on the host. Raises SkyrunError if that fails or the file has changed."""
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        reads = [
            self._threads.submit(self._fill, view[extent.at + start : extent.at + end], extent.offset + start)
            for extent in extents
            for start, end in _chunks(extent)
        ]
        failure = None
        for read in reads:  # wait for all, so that even after an error no thread still writes to the buffer
            try:
                read.result()
            except Exception as error:
                if failure is None:
                    failure = error
                    for other in reads:
                        other.cancel()
        if failure is not None:
            raise failure
        self._check()

    def close(self) -> None:
        """Stop the threads after the chunks that they are reading. Reads that are not finished fail."""
        self._threads.shutdown(cancel_futures=True)
        for file in self._files:
            file.close()

    def _fill(self, target: memoryview, offset: int) -> None:
        fill(target, offset, self._read, str(self._path))

    def _read_positions(self, target: memoryview, offset: int) -> int:
        return os.preadv(self._files[0].fileno(), [target], offset)

    def _read_own(self, target: memoryview, offset: int) -> int:
        """Read with a file object per thread, because reading moves its position. For systems without preadv."""
        if not hasattr(self._mine, "read_at"):
            file = open_unbuffered(self._path)
            self._files.append(file)
            self._mine.read_at = read_at(file)
        got: int = self._mine.read_at(target, offset)
        return got

    def _open_direct(self) -> None:
        try:
            file = FileIO(os.open(self._path, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            return  # direct reads are not supported; any other problem will show up when the file is read
        self._files.append(file)
        self._read = partial(self._read_around, file.fileno())

    def _read_around(self, file: int, target: memoryview, offset: int) -> int:
        """Read directly: whole pages straight to page-aligned memory, the rest through a buffer."""
        place, lead = np.frombuffer(target, np.uint8), offset % PAGE
        fits = (place.ctypes.data - offset) % PAGE == 0
        if fits and lead == 0 and len(place) >= PAGE:
            got = self._read_pages(file, place[: len(place) // PAGE * PAGE], offset)
        else:
            if not hasattr(self._mine, "pages"):
                self._mine.pages = np.frombuffer(mmap(-1, _CHUNK), np.uint8)
            pages = self._mine.pages[: PAGE if fits else -(-(lead + len(place)) // PAGE) * PAGE]
            got = min(self._read_pages(file, pages, offset - lead) - lead, len(place))
            if got > 0:
                np.copyto(place[:got], pages[lead : lead + got])  # numpy releases the GIL for this copy
        return got if got > 0 else self._read_positions(target, offset)  # not supported, or the file ends here

    def _read_pages(self, file: int, pages: np.ndarray[Any, np.dtype[np.uint8]], offset: int) -> int:
        try:
            return os.preadv(file, [pages.data], offset)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
        self._read = self._read_positions
        return 0

    def _identity(self) -> tuple[int, int, int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _check(self) -> None:
        """Raise SkyrunError if the file has changed. A deleted file is fine: it stays readable while it is open."""
        found = self._identity()
        if found is None or self._found is None or found == self._found:
            return
        if found[:2] != self._found[:2]:
            change = "replaced by another file"
        elif found[2] != self._found[2]:
            change = f"changed from {self._found[2]} to {found[2]} bytes"
        else:
            change = "written to"
        raise SkyrunError(f"{self._path} was {change} while it was read", "restore it and run again", FAILED)


def read_ahead(path: Path, extents: Sequence[Extent]) -> None:
    """Ask the system to read these extents into its page cache, if it supports that and the file fits."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), open_unbuffered(path) as file:
        if _exceeds_cache(os.fstat(file.fileno()).st_size):
            return
        for extent in extents:
            os.posix_fadvise(file.fileno(), extent.offset, extent.nbytes, os.POSIX_FADV_WILLNEED)


def _exceeds_cache(nbytes: int) -> bool:
    return bool(nbytes > CACHED_SHARE * psutil.virtual_memory().available)


def _chunks(extent: Extent) -> list[tuple[int, int]]:
    """The (start, end) of an extent's chunks, which are cut at multiples of _CHUNK in the file: at page borders."""
    cuts = range((extent.offset // _CHUNK + 1) * _CHUNK - extent.offset, extent.nbytes, _CHUNK)
    return list(zip([0, *cuts], [*cuts, extent.nbytes], strict=True))
