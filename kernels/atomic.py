"""Files appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is flushed and renamed over `path`, on failure removed.

    What a killed process left of the same file is removed too. private: only the user may read the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _remove_abandoned(path)
    try:
        partial.touch(0o600 if private else 0o666)
        mode = partial.stat().st_mode
        yield partial
        os.chmod(partial, mode)  # as the user's umask has it, whatever the library that wrote it chose
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    prefix, suffix = f".{path.name}.", ".partial"
    for file in path.parent.iterdir():
        if file.name.startswith(prefix) and file.name.endswith(suffix):
            owner = file.name[len(prefix) : -len(suffix)]
            if owner.isdecimal() and not psutil.pid_exists(int(owner)):
                file.unlink(missing_ok=True)
