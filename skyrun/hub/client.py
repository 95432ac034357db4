"""Files of a repository on the Hugging Face Hub: list them, read pieces of them, fetch them whole.

Endpoint, token, offline mode and cache are those of huggingface-hub. It begins a file anew in every process, so the
bytes are fetched here: what has arrived is kept beside the file's place, and the next fetch goes on from there.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from skyrun.errors import BAD_INPUT, FAILED, MODEL_MISSING, SkyrunError

# Of the HTTP client under huggingface-hub, which is another one in each of its versions.
_HTTPError: type[BaseException] = HfHubHTTPError.__bases__[0]
_CHUNK = 1 << 18
_TRIES = 4  # in a row that bring nothing
_WAIT = 1.0  # seconds before the first of them, twice as long before each other
_BUSY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit. sha256: "" for small files, which git keeps; blob: git's name for those."""

    repo: str
    commit: str
    path: str
    nbytes: int
    sha256: str
    blob: str

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def key(self) -> str:
        """What a manifest calls it."""
        return f"{self.repo}/{self.path}"

    @property
    def identity(self) -> str:
        """Hexadecimal digits that no other content has."""
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Repository:
    """What a repository holds at one commit."""

    name: str
    commit: str
    files: tuple[RemoteFile, ...]


def list_repository(name: str, commit: str | None = None) -> Repository:
    """The files of a repository, as they are now or at a commit. SkyrunError says why they cannot be listed.

    Offline, or where the hub cannot be reached, those that huggingface-hub's cache has of it.
    """
    api = HfApi()
    with _explained(name, began_with=commit):
        try:
            sha = commit or str(api.model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha)
            entries = list(api.list_repo_tree(name, recursive=True, revision=sha))
        except (OfflineModeIsEnabled, _HTTPError) as error:
            cached = None if isinstance(error, HfHubHTTPError) else _cached_repository(name, commit)
            if cached is None:
                raise
            return cached
    files = [
        RemoteFile(name, sha, entry.path, entry.size, entry.lfs.sha256 if entry.lfs else "", entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile)
    ]
    for file in files:
        if "\\" in file.path or ".." in (parts := PurePosixPath(file.path).parts) or "/" in parts:
            raise SkyrunError(f"{name} has a file {file.path!r}, which would leave its folder", "do not use it")
    return Repository(name, sha, tuple(files))


def _cached_repository(name: str, commit: str | None) -> Repository | None:
    """What the cache of huggingface-hub has of a repository; it names files by what the hub says of their content."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        sha = commit or (folder / "refs" / constants.DEFAULT_REVISION).read_text().strip()
        paths = [path for path in (folder / "snapshots" / sha).rglob("*") if path.is_file()]
    except OSError:
        return None
    files = []
    for path in sorted(paths):
        blob = path.resolve().name
        if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob):  # else the cache has no links, and no names of content
            inside = path.relative_to(folder / "snapshots" / sha).as_posix()
            sha256 = blob if len(blob) == 64 else ""
            files.append(RemoteFile(name, sha, inside, path.stat().st_size, sha256, "" if sha256 else blob))
    return Repository(name, sha, tuple(files)) if files else None


def read_start(file: RemoteFile, nbytes: int) -> bytes:
    """The first bytes of a file, fewer if it has fewer."""
    if (cached := _cached(file)) is not None:
        with open(cached, "rb") as content:
            return content.read(nbytes)
    with _explained(file.repo):
        tries = 0
        while True:
            try:
                return _start(file, min(nbytes, file.nbytes))
            except _HTTPError as error:
                tries += 1
                if tries == _TRIES or not _passing(error):
                    raise
            time.sleep(_WAIT * 2 ** (tries - 1))


def _start(file: RemoteFile, nbytes: int) -> bytes:
    data = b""
    with _stream(file, 0, nbytes) as (_, chunks):
        for chunk in chunks:
            data += chunk
            if len(data) >= nbytes:
                break
    return data[:nbytes]


def fetch(file: RemoteFile, place: Path, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Bring a file to its place and check it. Bytes are counted as they come, first those that were there before.

    Interrupted or cut off, it goes on from there the next time. SkyrunError if it cannot be had or is damaged.
    """
    if is_here(file, place):
        on_bytes(file.nbytes)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(place)
    if _from_cache(file, partial):
        on_bytes(file.nbytes)
    else:
        with _explained(file.repo, place):
            _download(file, partial, on_bytes)
    os.replace(partial, place)


def partial_of(place: Path) -> Path:
    """Where a file is while it arrives."""
    return place.with_name(f"{place.name}.part")


def is_here(file: RemoteFile, place: Path) -> bool:
    """Whether a file is at its place as a whole: it was checked before it got there."""
    return place.is_file() and place.stat().st_size == file.nbytes


def arrived(file: RemoteFile, place: Path) -> int:
    """How many bytes of a file are on the disk."""
    if is_here(file, place):
        return file.nbytes
    partial = partial_of(place)
    return min(partial.stat().st_size, file.nbytes) if partial.is_file() else 0


def _from_cache(file: RemoteFile, partial: Path) -> bool:
    """Whether huggingface-hub's cache has the file: then it is here too, without a copy where that is possible."""
    cached = _cached(file)
    if cached is None:
        return False
    partial.unlink(missing_ok=True)
    try:
        os.link(cached.resolve(), partial)
    except OSError:
        shutil.copyfile(cached, partial)
    with open(partial, "rb") as content:
        good = _checksum(file, content).matches()
    if not good:
        partial.unlink()
    return good


def _cached(file: RemoteFile) -> Path | None:
    cached = try_to_load_from_cache(file.repo, file.path, revision=file.commit)
    return Path(cached) if isinstance(cached, str) else None


class _Checksum:
    """What the hub says of a file's content, computed as it comes."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.begin()

    def begin(self) -> None:
        file = self._file
        self._digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.nbytes}\0".encode())

    def add(self, data: bytes) -> None:
        self._digest.update(data)

    def matches(self) -> bool:
        return self._digest.hexdigest() == self._file.identity

    def problem(self) -> str:
        digest, expected = self._digest.hexdigest(), self._file.identity
        return f"its {self._digest.name} is {digest[:16]}..., the hub says {expected[:16]}..."


def _checksum(file: RemoteFile, content: BinaryIO) -> _Checksum:
    checksum = _Checksum(file)
    while data := content.read(_CHUNK):
        checksum.add(data)
    return checksum


def _download(file: RemoteFile, partial: Path, on_bytes: Callable[[int], None]) -> None:
    if partial.exists() and partial.stat().st_size > file.nbytes:
        partial.unlink()
    with open(partial, "a+b") as out:
        out.seek(0)
        checksum = _checksum(file, out)
        on_bytes(out.tell())
        most, tries = out.tell(), 0
        while out.tell() < file.nbytes and tries < _TRIES:
            try:
                _append(file, out, checksum, on_bytes)
            except _HTTPError as error:
                if not _passing(error) or (tries + 1 == _TRIES and out.tell() <= most):
                    raise
            tries = 0 if out.tell() > most else tries + 1
            most = max(most, out.tell())
            if out.tell() < file.nbytes:
                time.sleep(_WAIT * 2**tries)
        out.flush()
        os.fsync(out.fileno())
    if partial.stat().st_size == file.nbytes and checksum.matches():
        return
    partial.unlink()
    raise SkyrunError(
        f"{file.path} of {file.repo} arrived damaged: {checksum.problem()}",
        "run the same command again to fetch it anew; if that does not help, a proxy or a mirror changes it",
        FAILED,
    )


def _passing(error: BaseException) -> bool:
    """Whether it may be better in a moment: a lost connection, or a server that is busy."""
    response = getattr(error, "response", None)
    return not isinstance(error, OfflineModeIsEnabled) and (response is None or response.status_code in _BUSY)


def _append(file: RemoteFile, out: BinaryIO, checksum: _Checksum, on_bytes: Callable[[int], None]) -> None:
    """Fetch what is missing, or everything if the server has no ranges."""
    at = out.tell()
    with _stream(file, at, file.nbytes) as (start, chunks):
        if start != at:
            on_bytes(start - at)
            out.truncate(start)
            out.seek(start)
            checksum.begin()
        for chunk in chunks:
            room = file.nbytes - out.tell()
            out.write(chunk[:room])
            checksum.add(chunk[:room])
            on_bytes(len(chunk[:room]))
            if len(chunk) > room:
                break


@contextmanager
def _stream(file: RemoteFile, start: int, stop: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Where the bytes begin, start or 0, and they themselves."""
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if start or stop < file.nbytes:
        headers["Range"] = f"bytes={start}-{stop - 1}"
    url = hf_hub_url(file.repo, file.path, revision=file.commit)
    session = get_session()
    with session.stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        yield (start if response.status_code == 206 else 0), response.iter_bytes(_CHUNK)


def endpoint() -> str:
    """The hub that is asked: $HF_ENDPOINT, or the one of huggingface-hub."""
    return constants.ENDPOINT


@contextmanager
def _explained(repo: str, place: Path | None = None, began_with: str | None = None) -> Iterator[None]:
    """Turn what the library raises into what a person can act on.

    place: of a file that is kept as far as it came. began_with: the commit that files were fetched from before.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        message = f"{repo} is not on this machine as a whole, and HF_HUB_OFFLINE is set"
        raise SkyrunError(message, "unset HF_HUB_OFFLINE and run the same command again", MODEL_MISSING) from error
    except HFValidationError as error:
        hint = "expected a task (r2v), OWNER/NAME, or OWNER/NAME:TYPE such as OWNER/NAME:Q4_K_M"
        raise SkyrunError(f"{repo!r} is not the name of a repository", hint, BAD_INPUT) from error
    except RevisionNotFoundError as error:
        message = f"{repo} no longer has the commit {began_with} that its files were fetched from so far"
        hint = f"delete the folder of the model to begin anew: skyrun-model.json in it names {repo}"
        raise SkyrunError(message, hint, MODEL_MISSING) from error
    except HfHubHTTPError as error:
        raise _refused(repo, error) from error
    except _HTTPError as error:
        hint = "check the connection (and HF_ENDPOINT, HTTPS_PROXY), then run the same command again"
        if place is not None and partial_of(place).exists():
            raise SkyrunError(
                f"the connection to {endpoint()} was lost: {error}", f"{hint} to go on from there", MODEL_MISSING
            ) from error
        raise SkyrunError(f"{endpoint()} cannot be reached: {error}", hint, MODEL_MISSING) from error
    except OSError as error:
        if place is None:
            raise
        hint = "check free space and permissions, then run the same command again to go on from there"
        raise SkyrunError(f"cannot write {place}: {error}", hint, FAILED) from error


def _refused(repo: str, error: HfHubHTTPError) -> SkyrunError:
    """The hub has answered, but not with the file."""
    status = error.response.status_code
    login = "`hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        hint = f"accept them at {endpoint()}/{repo}, then {login}"
        return SkyrunError(f"{repo} is open only to those who have accepted its conditions", hint, MODEL_MISSING)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        message = f"{endpoint()} has no {repo} to show (status {status}): it does not exist, or it is private"
        return SkyrunError(message, f"check the name; for a private one {login}", MODEL_MISSING)
    message = f"{endpoint()} answers with status {status} when asked for {repo}"
    return SkyrunError(message, "it may be busy: run the same command again later to go on from there", MODEL_MISSING)
