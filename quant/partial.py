"""An output file in the making: beside its place, with a journal of the tensors that are whole.

An interrupted conversion leaves both; the next one of the same sources with the same settings goes on from there, any
other begins anew. Nothing under the final name changes before the file is complete.
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

import skyrun.kernels
from skyrun.kernels.errors import FAILED, SkyrunError
from skyrun.quant.plan import PlannedFile, PlannedTensor

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_SYNC_SECONDS = 2.0  # how much work a power failure may cost


def partial_path(path: Path) -> Path:
    """Where a file is while it is not complete."""
    return path.with_name(f"{path.name}.partial")


def _journal_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial.journal")


class PartialFile:
    """A file while it is written. done: names of the tensors that are in it."""

    def __init__(self, path: Path, done: set[str], journal: BinaryIO) -> None:
        self.path, self.done = path, done
        self._journal = journal
        self._unsynced: list[str] = []
        self._synced = time.monotonic()

    def finished(self, tensor: PlannedTensor) -> None:
        """All bytes of a tensor are in the file."""
        self.done.add(tensor.name)
        self._unsynced.append(tensor.name)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring the data to the disk, then the journal that vouches for it."""
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
    SkyrunError if another conversion is writing it.
    """
    path, journal_path = partial_path(file.path), _journal_path(file.path)
    with _locked(journal_path) as journal:
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
                with suppress(OSError):  # the one that is being raised says more
                    partial.sync()
            raise
        finally:
            if not keep:
                path.unlink(missing_ok=True)
                journal.truncate(0)
                with suppress(PermissionError):  # Windows keeps what is open
                    journal_path.unlink()


@contextmanager
def _locked(journal_path: Path) -> Iterator[BinaryIO]:
    """The journal, open and for this conversion alone."""
    journal_path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(journal_path, "a+b") as journal:
            try:
                if sys.platform == "win32":
                    msvcrt.locking(journal.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                name = journal_path.name.removesuffix(".partial.journal")
                hint = "wait for it, or choose another folder with -o"
                raise SkyrunError(f"another conversion is writing {name} in {journal_path.parent}", hint) from error
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(journal.fileno()), journal_path.stat()):
                    yield journal
                    return
            # It was removed between opening and locking, by one that has just ended.


def _prepare(file: PlannedFile, device: str, journal: BinaryIO) -> set[str]:
    """Bring the partial file and its journal into a state to go on from. The names of tensors that are in the file."""
    path = partial_path(file.path)
    head = _line({"fingerprint": _fingerprint(file, device)})
    journal.seek(0)
    good = _good_lines(file, head, journal.read())
    if good is not None:
        journal.truncate(len(head) + sum(map(len, good)))
        return {good[line] for line in good}
    journal.truncate(0)  # before the data: a journal must never vouch for what is not there
    with open(path, "wb") as out:
        out.truncate(file.nbytes)
        out.write(file.header)
    journal.write(head)
    journal.flush()
    return set()


def _good_lines(file: PlannedFile, head: bytes, journal: bytes) -> dict[bytes, str] | None:
    """Lines of a journal and the tensors that they vouch for; None if it is about another file."""
    path = partial_path(file.path)
    first, *rest = journal.splitlines(keepends=True) or [b""]
    if first != head or not path.is_file() or path.stat().st_size != file.nbytes:
        return None
    names = {_line({"done": tensor.name}): tensor.name for tensor in file.tensors}
    return {line: names[line] for line in takewhile(names.__contains__, rest)}  # the last line may be cut


def finished_before(file: PlannedFile, device: str = "cpu") -> set[str]:
    """Names of the tensors that an interrupted conversion has finished. Changes nothing."""
    try:
        journal = _journal_path(file.path).read_bytes()
    except OSError:
        return set()
    good = _good_lines(file, _line({"fingerprint": _fingerprint(file, device)}), journal)
    return set(good.values()) if good else set()


def _line(entry: dict[str, str]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _fingerprint(file: PlannedFile, device: str) -> str:
    """Everything that decides the bytes of a file: what is read, what it becomes, and the code that does it."""
    digest = hashlib.sha256(file.header)
    digest.update(f"{device} {torch.__version__}".encode())
    for package in (Path(__file__).parent, Path(skyrun.kernels.__path__[0])):
        for code in sorted(package.glob("*.py")):
            digest.update(code.read_bytes())
    for source, stamp in file.sources.items():
        digest.update(f"{source.resolve()} {stamp}".encode())
    for tensor in file.tensors:
        digest.update(f"{tensor.name} {tensor.source.name} {tensor.source.offset} {tensor.type}".encode())
        if tensor.importance is not None:
            digest.update(tensor.importance.numpy().tobytes())
    return digest.hexdigest()
