"""Write files atomically: they appear complete or not at all."""

import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_PID_NAMESPACE = "/proc/self/ns/pid"  # differs between containers; Linux only


@contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is flushed and renamed over `path`, on failure removed.

    private: only the user may read the file. What a killed process of this machine left of the same file is removed
    too. On a folder that machines share, those of another machine are not: whether their process is alive cannot be
    seen from here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = f".{path.name}.{_machine()}-"
    partial = path.with_name(f"{ours}{os.getpid()}.partial")
    _remove_abandoned(path.parent, ours)
    try:
        partial.touch(0o600 if private else 0o666)
        mode = partial.stat().st_mode
        yield partial
        os.chmod(partial, mode)  # the mode that the user's umask gives, whatever the writing library has set
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _machine() -> str:
    """An id of the place where process ids are unique: the host, the system on it, and the container."""
    try:
        namespace = os.readlink(_PID_NAMESPACE)
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {sys.platform} {namespace}".encode()).hexdigest()[:8]


def _remove_abandoned(folder: Path, ours: str) -> None:
    suffix = ".partial"
    for file in folder.iterdir():
        if file.name.startswith(ours) and file.name.endswith(suffix):
            owner = file.name[len(ours) : -len(suffix)]
            if owner.isdecimal() and not psutil.pid_exists(int(owner)):
                file.unlink(missing_ok=True)
