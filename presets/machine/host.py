"""What the operating system reports: memory, including container limits, disks, and the kind of system."""

import mmap
import os
import platform
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

ASSUMED_DISK_RATE = 0.5e9  # bytes per second of a SATA SSD
CACHED_SHARE = 0.7  # of the free memory: larger files would push each other's pages out of the page cache
_CHUNK, _READERS = 4 << 20, 8
_LEAST_FILE, _MOST_READ, _MOST_SECONDS = 64 << 20, 512 << 20, 0.5  # limits for measuring a disk


def memory() -> tuple[int, int]:
    """Bytes of RAM, and how many of them are available: what the system or the container allows, if that is less."""
    import psutil  # here, as other slow imports: constants of presets are read where nothing is measured

    system = psutil.virtual_memory()
    total, available = system.total, system.available
    for limit, used in _container_limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _container_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """(limit, used) of every control group of this process. Cached pages that can be dropped do not count as used."""
    found = []
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        folder, names = (root, ("memory.max", "memory.current", "inactive_file"))
        if controllers:
            folder = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if "memory" not in controllers.split(","):
                continue
        for place in {folder, *(folder / part for part in _parents(path))}:
            limit, used = (_text(place / name).strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():
                kept = dict(line.split(" ", 1) for line in _text(place / "memory.stat").splitlines() if " " in line)
                found.append((int(limit), int(used) - int(kept.get(names[2], 0))))
    return found


def _parents(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part and part != ".."]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def where() -> str:
    """ "WSL", "Windows" or "Linux". How much memory can be page-locked and how fast disks are depends on it."""
    if "microsoft" in platform.release().lower():
        return "WSL"
    return platform.system()


def cpu_name() -> str:
    """The CPU's model name as the system reports it."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def free_space(folder: Path) -> int:
    """Bytes free on the file system that holds a folder or that will hold it."""
    return shutil.disk_usage(nearest_existing(folder)).free


def nearest_existing(path: Path) -> Path:
    """The path itself if it exists, else its nearest parent that does: the path will be on the same disk."""
    return next(place for place in (path, *path.absolute().parents) if os.path.exists(place))


def disk_rate(path: Path) -> float:
    """Measure for half a second how many bytes per second of a file are read around the page cache.

    0 if the file is too small, or if the system cannot bypass its cache.
    """
    if path.stat().st_size < _LEAST_FILE:
        return 0.0
    with suppress(OSError):  # of file systems that refuse it
        return read_rate(path, hasattr(os, "O_DIRECT"), _MOST_READ, _MOST_SECONDS)
    return read_rate(path, False, _MOST_READ, _MOST_SECONDS)


def read_rate(path: Path, direct: bool, nbytes: int | None = None, seconds: float = float("inf")) -> float:
    """Measure how many bytes per second several threads read of a file that is not in the page cache.

    Args:
        path: The file.
        direct: Whether reads go around the page cache, of which nothing is dropped then. Some file systems refuse that
            with an OSError.
        nbytes: Reads at most this much, None for the whole file.
        seconds: Begins no read after this time.

    Returns 0 on systems that cannot drop a file from their cache.
    """
    from concurrent.futures import ThreadPoolExecutor

    if not hasattr(os, "preadv") or not (direct or forget(path, nbytes or 0)):
        return 0.0
    size = path.stat().st_size
    whole = size if nbytes is None else min(size, nbytes)
    file = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    mine, ends = threading.local(), time.perf_counter() + seconds

    def read(offset: int) -> int:
        if time.perf_counter() > ends:
            return 0
        if not hasattr(mine, "buffer"):
            mine.buffer = mmap.mmap(-1, _CHUNK)  # begins with a page, as reads around the page cache have to
        return os.preadv(file, [mine.buffer], offset)

    try:
        with ThreadPoolExecutor(_READERS) as threads:
            start = time.perf_counter()
            done = sum(threads.map(read, range(0, whole, _CHUNK)))
            return done / (time.perf_counter() - start)
    finally:
        os.close(file)


def forget(path: Path, nbytes: int = 0) -> bool:
    """Ask the system to drop the first bytes of a file, 0 for all, from its cache. False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        with suppress(OSError):  # of file systems that write nothing
            os.fsync(file.fileno())  # pages that are not on the disk yet stay
        os.posix_fadvise(file.fileno(), 0, nbytes, os.POSIX_FADV_DONTNEED)
    return True
