"""What the operating system reports: memory, including container limits, disks, and the kind of system."""

import mmap
import os
import platform
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

ASSUMED_DISK_RATE = 0.5e9  # bytes per second that a SATA SSD delivers
_CHUNK, _READERS = 4 << 20, 8
_LEAST_FILE, _MOST_READ, _MOST_SECONDS = 64 << 20, 512 << 20, 0.5  # limits for measuring a disk


def memory() -> tuple[int, int]:
    """(total, available) bytes of RAM: those of the system, or of the container if it allows less."""
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
    """Measure for half a second how many bytes per second are read from a file, bypassing the page cache.

    0 if the file is too small, or if the system cannot bypass its cache.
    """
    size = path.stat().st_size
    if size < _LEAST_FILE or not hasattr(os, "posix_fadvise"):
        return 0.0
    with suppress(OSError):  # some file systems refuse O_DIRECT
        return _read_rate(path, size, getattr(os, "O_DIRECT", 0))
    return _read_rate(path, size, 0)


def _read_rate(path: Path, size: int, flags: int) -> float:
    """Read chunks with several threads until _MOST_READ bytes or _MOST_SECONDS are reached."""
    ends = time.perf_counter() + _MOST_SECONDS
    file = os.open(path, os.O_RDONLY | flags)

    def read(offset: int) -> int:
        if time.perf_counter() > ends:
            return 0
        with mmap.mmap(-1, _CHUNK) as buffer:  # page-aligned, which O_DIRECT requires
            return os.preadv(file, [buffer], offset)

    try:
        if not flags:  # without O_DIRECT the file must first leave the page cache
            os.posix_fadvise(file, 0, _MOST_READ, os.POSIX_FADV_DONTNEED)
        with ThreadPoolExecutor(_READERS) as threads:
            start = time.perf_counter()
            done = sum(threads.map(read, range(0, min(size - _CHUNK, _MOST_READ), _CHUNK)))
            return done / (time.perf_counter() - start)
    finally:
        os.close(file)
