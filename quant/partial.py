"""An unfinished output file, with a journal of the tensors that are complete.

An interrupted conversion leaves both. The next conversion of the same sources with the same settings continues there;
any other starts again. Nothing under the final name changes before the file is complete.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock, Timeout

from skyrun.kernels.errors import FAILED, SkyrunError
from skyrun.quant.encoders.encode import ENCODER_VERSION
from skyrun.quant.plan import PlannedFile, PlannedTensor
from skyrun.quant.sources.source import SourceTensor

_SYNC_SECONDS = 2.0  # how much work may be lost in a power failure


def partial_path(path: Path) -> Path:
    """The path of a file while it is not complete."""
    return path.with_name(f"{path.name}.partial")


def _journal_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial.journal")


class PartialFile:
    """A file that is being written. done: names of the tensors that are complete."""

    def __init__(self, path: Path, done: set[str], journal: BinaryIO) -> None:
        self.path, self.done = path, done
        self._journal = journal
        self._unsynced: list[str] = []
        self._synced = time.monotonic()

    def finished(self, tensor: PlannedTensor) -> None:
        """Record that all bytes of a tensor are in the file."""
        self.done.add(tensor.name)
        self._unsynced.append(tensor.name)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Write the data to disk, then the journal that says that it is complete."""
        with open(self.path, "rb+") as data:
            os.fsync(data.fileno())
        self._journal.writelines(_line({"done": name}) for name in self._unsynced)
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._unsynced.clear()
        self._synced = time.monotonic()


@contextmanager
def resumable(file: PlannedFile, device: str) -> Iterator[PartialFile]:
    """A partial file that gets its name when the body ends and every tensor is in it.

    It is kept if the body is interrupted or the disk fails, but not if the source is bad or if nothing was finished.
    Raises SkyrunError if another conversion is writing it.
    """
    path, journal_path = partial_path(file.path), _journal_path(file.path)
    with _alone(file.path), open(journal_path, "a+b") as journal:
        partial = PartialFile(path, set(), journal)
        keep = False
        try:
            partial.done = _prepare(file, device, journal)
            yield partial
            partial.sync()
            keep = len(partial.done) < len(file.tensors)
            if not keep:
                os.replace(path, file.path)
        except BaseException as error:
            bad_source = isinstance(error, SkyrunError) and error.code != FAILED
            keep = bool(partial.done) and not bad_source
            if keep:
                with suppress(OSError):  # the error that is being raised says more
                    partial.sync()
            raise
        finally:
            if not keep:
                path.unlink(missing_ok=True)
                journal.truncate(0)
                with suppress(PermissionError):  # Windows cannot delete open files
                    journal_path.unlink()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock on the output file. Raises SkyrunError if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.partial.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        hint = "wait for it, or choose another folder with -o"
        raise SkyrunError(f"another conversion is writing {path.name} in {path.parent}", hint) from error
    try:
        yield
    finally:
        if sys.platform != "win32":  # Windows cannot delete open files, and a released lock may be taken by others
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _prepare(file: PlannedFile, device: str, journal: BinaryIO) -> set[str]:
    """Prepare the partial file and its journal for writing. Returns the names of tensors that are already complete."""
    path = partial_path(file.path)
    head = _line({"fingerprint": _fingerprint(file, device)})
    journal.seek(0)
    good = _good_lines(file, head, journal.read())
    if good is not None:
        journal.truncate(len(head) + sum(map(len, good)))
        return {good[line] for line in good}
    journal.truncate(0)  # before the data: a journal must never list tensors that are not in the file
    with open(path, "wb") as out:
        out.truncate(file.nbytes)
        out.write(file.header)
    journal.write(head)
    journal.flush()
    return set()


def _good_lines(file: PlannedFile, head: bytes, journal: bytes) -> dict[bytes, str] | None:
    """The valid lines of a journal with the tensors that they list; None if the journal belongs to another file."""
    path = partial_path(file.path)
    first, *rest = journal.splitlines(keepends=True) or [b""]
    if first != head or not path.is_file() or path.stat().st_size != file.nbytes:
        return None
    names = {_line({"done": tensor.name}): tensor.name for tensor in file.tensors}
    return {line: names[line] for line in takewhile(names.__contains__, rest)}  # the last line may be incomplete


def finished_before(file: PlannedFile, device: str = "cpu") -> set[str]:
    """Names of the tensors that an interrupted conversion has finished. No file is changed."""
    try:
        journal = _journal_path(file.path).read_bytes()
    except OSError:
        return set()
    good = _good_lines(file, _line({"fingerprint": _fingerprint(file, device)}), journal)
    return set(good.values()) if good else set()


def _line(entry: dict[str, str]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _fingerprint(file: PlannedFile, device: str) -> str:
    """A digest of everything that determines the bytes of a file: sources, types, and the encoders' version."""
    digest = hashlib.sha256(file.header)
    digest.update(f"{device} {torch.__version__} {ENCODER_VERSION}".encode())
    for source, stamp in file.sources.items():
        digest.update(f"{source.resolve()} {stamp}".encode())
    for tensor in file.tensors:
        digest.update(f"{tensor.name} {_place(tensor.source)} {tensor.type}".encode())
        if tensor.importance is not None:
            digest.update(tensor.importance.numpy().tobytes())
    return digest.hexdigest()


def _place(source: SourceTensor) -> str:
    """Where a tensor's bytes lie in its file and how they are read. It does not depend on where the file is."""
    more = [_place(part) for part in (*source.parts, *([source.scale] if source.scale else []))]
    for added in source.added:
        more += [f"{added.scale}", *(_place(part) for part in (added.up, added.down) if part)]
    return f"{source.name} {source.shape} {source.dtype} {source.offset} {source.transposed} {more}"
