"""List the files of a repository on the Hugging Face Hub, read their beginnings, and download them.

Endpoint, token, offline mode and cache are those of huggingface-hub. That library restarts a download in every process,
so files are downloaded here: what has arrived is kept beside the file, and the next download resumes from there.
Listings are read here too, because the library neither checks nor limits what a hub answers.
"""

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from skyrun.errors import BAD_INPUT, FAILED, MODEL_MISSING, SkyrunError
from skyrun.events import Event, Progress, StageEnded, StageStarted, now
from skyrun.hub.repository import (
    MAX_PAGES,
    MAX_REPLY,
    BadReply,
    RemoteFile,
    Repository,
    cached_repository,
    one_line,
    parse_commit,
    parse_files,
)

T = TypeVar("T")

# The base error of the HTTP client of huggingface-hub, which differs between its versions.
_HTTPError: type[BaseException] = HfHubHTTPError.__bases__[0]
_CHUNK = 1 << 18
_TRIES = 4  # in a row without progress
_WAIT = 1.0  # seconds before the first retry; doubled before each further one
_ADDRESS = re.compile("[!-~]{1,4000}")
_BUSY = (408, 429, 500, 502, 503, 504)  # status codes that are worth a retry

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it prints warnings from hubs without escaping them


class Unavailable(SkyrunError):
    """The hub does not have or does not show a repository. Another one may do instead."""


def list_repository(name: str, commit: str | None = None) -> Repository:
    """List the files of a repository, now or at a commit. Raises SkyrunError if that fails.

    Offline, or if the hub cannot be reached, lists the files in the cache of huggingface-hub.
    """
    with _explained(name, began_with=commit):
        validate_repo_id(name)
        address = f"{endpoint()}/api/models/{name}"
        try:
            sha = commit or parse_commit(_retried(lambda: _reply(address))[0])
            return Repository(name, sha, tuple(_files(f"{address}/tree/{sha}?recursive=true", name, sha)))
        except (OfflineModeIsEnabled, _HTTPError) as error:
            found = None
            if not isinstance(error, HfHubHTTPError):
                cache = Path(constants.HF_HUB_CACHE)
                found = cached_repository(cache, name, commit, constants.DEFAULT_REVISION)
            if found is None:
                raise
            return found


def _files(address: str, name: str, sha: str) -> Iterator[RemoteFile]:
    seen: set[str] = set()
    following: str | None = address
    for _ in range(MAX_PAGES):
        if following is None:
            return
        reply, following = _retried(partial(_reply, following))
        for file in parse_files(reply, name, sha):
            if file.path in seen:
                raise BadReply(f"{file.path} twice in a list of files")
            seen.add(file.path)
            yield file
        if following is not None and not (following.startswith(f"{endpoint()}/api/") and _ADDRESS.fullmatch(following)):
            raise BadReply(f"a list of files that goes on elsewhere, at {one_line(following)[:80]}")
    raise BadReply(f"a list of files of more than {MAX_PAGES} pages")


def _reply(address: str) -> tuple[bytes, str | None]:
    """The body of a reply, and the address of the next page."""
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    data = b""
    with get_session().stream("GET", address, headers=headers, timeout=constants.HF_HUB_ETAG_TIMEOUT) as response:
        _check_status(response)
        for chunk in response.iter_bytes(_CHUNK):
            data += chunk
            if len(data) > MAX_REPLY:
                raise BadReply(f"more than {MAX_REPLY >> 20} MiB where a list is expected")
        return data, response.links.get("next", {}).get("url")


def _check_status(response: Any) -> None:
    """Raise the error of a failed request. Its body is never read: it may be anything, of any length."""
    if response.is_error:
        response.close()
    hf_raise_for_status(response)


def _retried(ask: Callable[[], T]) -> T:
    """Call `ask`, and retry errors that may pass."""
    tries = 0
    while True:
        try:
            return ask()
        except _HTTPError as error:
            tries += 1
            if tries == _TRIES or not _passing(error):
                raise
        time.sleep(_WAIT * 2 ** (tries - 1))


def read_start(file: RemoteFile, nbytes: int) -> bytes:
    """The first `nbytes` bytes of a file, or the whole file if it is shorter."""
    if (cached := _cached(file)) is not None:
        with open(cached, "rb") as content:
            return content.read(nbytes)
    with _explained(file.repo):
        return _retried(lambda: _start(file, min(nbytes, file.nbytes)))


def _start(file: RemoteFile, nbytes: int) -> bytes:
    data = b""
    with _stream(file, 0, nbytes) as (_, chunks):
        for chunk in chunks:
            data += chunk
            if len(data) >= nbytes:
                break
    return data[:nbytes]


def fetch(file: RemoteFile, place: Path) -> Generator[Event, None, None]:
    """Download a file to its place, check it, and yield progress. Does nothing if the file is there.

    An interrupted download is resumed the next time. Raises SkyrunError if the download fails or the file is damaged.
    """
    if is_here(file, place):
        return
    stage, start = f"fetch {file.name}", now()
    place.parent.mkdir(parents=True, exist_ok=True)
    arriving = partial_of(place)
    if _from_cache(file, arriving):
        yield StageStarted(stage, file.nbytes, "bytes", before=file.nbytes)
    else:
        with _explained(file.repo, place):
            yield from _download(file, arriving, stage)
    os.replace(arriving, place)
    yield StageEnded(stage, now() - start)


def partial_of(place: Path) -> Path:
    """The path of a file while it is downloaded."""
    return place.with_name(f"{place.name}.part")


def is_here(file: RemoteFile, place: Path) -> bool:
    """Whether a complete file is at its place. It was checked before it was moved there."""
    return place.is_file() and place.stat().st_size == file.nbytes


def arrived(file: RemoteFile, place: Path) -> int:
    """How many bytes of a file have been downloaded."""
    if is_here(file, place):
        return file.nbytes
    arriving = partial_of(place)
    return min(arriving.stat().st_size, file.nbytes) if arriving.is_file() else 0


def _from_cache(file: RemoteFile, arriving: Path) -> bool:
    """Take the file from the cache of huggingface-hub, with a hard link if possible. Returns whether it was there."""
    cached = _cached(file)
    if cached is None:
        return False
    arriving.unlink(missing_ok=True)
    try:
        os.link(cached.resolve(), arriving)
    except OSError:
        shutil.copyfile(cached, arriving)
    with open(arriving, "rb") as content:
        good = _checksum(file, content).matches()
    if not good:
        arriving.unlink()
    return good


def _cached(file: RemoteFile) -> Path | None:
    cached = try_to_load_from_cache(file.repo, file.path, revision=file.commit)
    return Path(cached) if isinstance(cached, str) else None


class _Checksum:
    """Computes the checksum of a file while it is downloaded, and compares it with that of the hub."""

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


def _download(file: RemoteFile, arriving: Path, stage: str) -> Generator[Event, None, None]:
    if arriving.exists() and arriving.stat().st_size > file.nbytes:
        arriving.unlink()
    with open(arriving, "a+b") as out:
        out.seek(0)
        checksum = _checksum(file, out)
        yield StageStarted(stage, file.nbytes, "bytes", before=out.tell())
        most, tries = out.tell(), 0
        while out.tell() < file.nbytes and tries < _TRIES:
            try:
                for done in _append(file, out, checksum):
                    yield Progress(stage, done)
            except _HTTPError as error:
                if not _passing(error) or (tries + 1 == _TRIES and out.tell() <= most):
                    raise
            tries = 0 if out.tell() > most else tries + 1
            most = max(most, out.tell())
            if out.tell() < file.nbytes:
                time.sleep(_WAIT * 2**tries)
        out.flush()
        os.fsync(out.fileno())
    if arriving.stat().st_size == file.nbytes and checksum.matches():
        return
    arriving.unlink()
    raise SkyrunError(
        f"{file.path} of {file.repo} arrived damaged: {checksum.problem()}",
        "run the same command again to fetch it anew; if that does not help, a proxy or a mirror changes it",
        FAILED,
    )


def _passing(error: BaseException) -> bool:
    """Whether a retry may help: the connection was lost, or the server is busy."""
    response = getattr(error, "response", None)
    return not isinstance(error, OfflineModeIsEnabled) and (response is None or response.status_code in _BUSY)


def _append(file: RemoteFile, out: BinaryIO, checksum: _Checksum) -> Iterator[int]:
    """Download the rest, or everything if the server does not support ranges. Yields how many bytes are there."""
    at = out.tell()
    with _stream(file, at, file.nbytes) as (start, chunks):
        if start != at:
            out.truncate(start)
            out.seek(start)
            checksum.begin()
        for chunk in chunks:
            room = file.nbytes - out.tell()
            out.write(chunk[:room])
            checksum.add(chunk[:room])
            yield out.tell()
            if len(chunk) > room:
                break


@contextmanager
def _stream(file: RemoteFile, start: int, stop: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Request a range of a file. Yields the offset that the reply begins at, `start` or 0, and its chunks."""
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if start or stop < file.nbytes:
        headers["Range"] = f"bytes={start}-{stop - 1}"
    url = hf_hub_url(file.repo, file.path, revision=file.commit)
    session = get_session()
    with session.stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        _check_status(response)
        yield (start if response.status_code == 206 else 0), response.iter_bytes(_CHUNK)


def endpoint() -> str:
    """The address of the hub: $HF_ENDPOINT, or the default of huggingface-hub."""
    return constants.ENDPOINT


@contextmanager
def _explained(repo: str, place: Path | None = None, began_with: str | None = None) -> Iterator[None]:
    """Turn the errors of the library into SkyrunErrors with a hint.

    place: of the file that is downloaded. began_with: the commit that files were downloaded from before.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        message = f"{repo} is not on this machine as a whole, and HF_HUB_OFFLINE is set"
        raise Unavailable(message, "unset HF_HUB_OFFLINE and run the same command again", MODEL_MISSING) from error
    except HFValidationError as error:
        hint = "expected a task (r2v), OWNER/NAME, or OWNER/NAME:TYPE such as OWNER/NAME:Q4_K_M"
        raise SkyrunError(f"{repo!r} is not the name of a repository", hint, BAD_INPUT) from error
    except BadReply as error:
        hint = "check HF_ENDPOINT and HTTPS_PROXY: something between here and the hub may answer in its place"
        raise SkyrunError(f"{endpoint()} answers with {error} when asked for {repo}", hint, MODEL_MISSING) from error
    except RevisionNotFoundError as error:
        message = f"{repo} no longer has the commit {began_with}"
        hint = f"delete the folder of the model to begin anew (skyrun list, skyrun remove): it is from {repo}"
        raise Unavailable(message, hint, MODEL_MISSING) from error
    except HfHubHTTPError as error:
        raise _refused(repo, error) from error
    except _HTTPError as error:
        hint = "check the connection (and HF_ENDPOINT, HTTPS_PROXY), then run the same command again"
        if place is not None and partial_of(place).exists():
            message = f"the connection to {endpoint()} was lost: {one_line(str(error))}"
            raise SkyrunError(message, f"{hint} to go on from there", MODEL_MISSING) from error
        raise SkyrunError(f"{endpoint()} cannot be reached: {one_line(str(error))}", hint, MODEL_MISSING) from error
    except OSError as error:
        if place is None:
            raise
        hint = "check free space and permissions, then run the same command again to go on from there"
        raise SkyrunError(f"cannot write {place}: {error}", hint, FAILED) from error


def _refused(repo: str, error: HfHubHTTPError) -> SkyrunError:
    """The error for a reply with a status code other than success."""
    status = error.response.status_code
    login = "`hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        hint = f"accept them at {endpoint()}/{repo}, then {login}"
        return Unavailable(f"{repo} is open only to those who have accepted its conditions", hint, MODEL_MISSING)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        message = f"{endpoint()} has no {repo} to show (status {status}): it does not exist, or it is private"
        return Unavailable(message, f"check the name; for a private one {login}", MODEL_MISSING)
    message = f"{endpoint()} answers with status {status} when asked for {repo}"
    return SkyrunError(message, "it may be busy: run the same command again later to go on from there", MODEL_MISSING)
