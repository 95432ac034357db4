"""What the system says of the machine beside the GPU: memory, also of containers, disks, and where it runs."""

import mmap
import os
import platform
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

ASSUMED_DISK_RATE = 0.5e9  # bytes per second of a SATA SSD
_CHUNK, _READERS = 4 << 20, 8
_LEAST_FILE, _MOST_READ, _MOST_SECONDS = 64 << 20, 512 << 20, 0.5  # of the measurement of a disk


def memory() -> tuple[int, int]:
    """Bytes of RAM, and how many of them are available: what the system or the container allows, if that is less."""
    system = psutil.virtual_memory()
    total, available = system.total, system.available
    for limit, used in _container_limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _container_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """(limit, used) of every control group that holds this process; pages of files that can be let go are not used."""
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
    """ "WSL", "Windows" or "Linux": how much memory can be page-locked, and how quick disks are, depends on it."""
    if "microsoft" in platform.release().lower():
        return "WSL"
    return platform.system()


def cpu_name() -> str:
    """The model of the CPU as the system has it."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def free_space(folder: Path) -> int:
    """Bytes free on the file system that holds a folder, or will hold it."""
    return shutil.disk_usage(nearest_existing(folder)).free


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists: whose disk it will be on."""
    return next(place for place in (path, *path.absolute().parents) if os.path.exists(place))


def disk_rate(path: Path) -> float:
    """Bytes per second of reading a file around the page cache, as measured for half a second.

    0 if the file is too small, or the system has no way around its cache.
    """
    size = path.stat().st_size
    if size < _LEAST_FILE or not hasattr(os, "posix_fadvise"):
        return 0.0
    with suppress(OSError):  # of file systems that refuse it
        return _read_rate(path, size, getattr(os, "O_DIRECT", 0))
    return _read_rate(path, size, 0)


def _read_rate(path: Path, size: int, flags: int) -> float:
    """Several threads read chunks, at most so many and so long."""
    ends = time.perf_counter() + _MOST_SECONDS
    file = os.open(path, os.O_RDONLY | flags)

    def read(offset: int) -> int:
        if time.perf_counter() > ends:
            return 0
        with mmap.mmap(-1, _CHUNK) as buffer:  # begins with a page, as reads around the page cache have to
            return os.preadv(file, [buffer], offset)

    try:
        if not flags:  # around the cache nothing of it has to go
            os.posix_fadvise(file, 0, _MOST_READ, os.POSIX_FADV_DONTNEED)
        with ThreadPoolExecutor(_READERS) as threads:
            start = time.perf_counter()
            done = sum(threads.map(read, range(0, min(size - _CHUNK, _MOST_READ), _CHUNK)))
            return done / (time.perf_counter() - start)
    finally:
        os.close(file)
