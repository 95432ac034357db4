"""Parse the replies of a hub. Every value is checked before it is used."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from skyrun.errors import MODEL_MISSING, SkyrunError

MAX_REPLY = 4 << 20  # bytes of a page; a thousand files take a tenth of that
MAX_PAGES = 50
_MAX_FILE = 1 << 43  # bytes
_MAX_PATH = 512
_SHOWN = 40  # characters of a wrong reply that are quoted


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit. sha256: "" for small files, which git stores. blob: git's SHA-1."""

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
        """Its key in a manifest."""
        return f"{self.repo}/{self.path}"

    @property
    def identity(self) -> str:
        """The checksum of its content, as hexadecimal digits."""
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Repository:
    """The files of a repository at one commit."""

    name: str
    commit: str
    files: tuple[RemoteFile, ...]


class BadReply(ValueError):
    """What is wrong with a reply: a clause that goes on after "the hub answers with"."""


def one_line(text: str) -> str:
    """Escape a text from outside, so that it takes one line and cannot control a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def is_commit(text: object) -> bool:
    """Whether this is the hash of a commit: 40 hexadecimal digits."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{40}", text) is not None


def is_plain_path(path: str) -> bool:
    """Whether a path with forward slashes stays inside its folder, on every system."""
    parts = path.split("/")
    windows = PureWindowsPath(path)
    outside = windows.drive or windows.root or "\\" in path or "\0" in path
    return not outside and not any(part in ("", ".", "..") for part in parts)


def parse_commit(reply: bytes) -> str:
    """The commit in a hub's description of a model. Raises BadReply if there is none."""
    said = _parse(reply)
    sha = said.get("sha") if isinstance(said, dict) else None
    if not is_commit(sha):
        raise BadReply(f"{_brief(sha)} as the commit, expected 40 hexadecimal digits")
    return str(sha)


def parse_files(reply: bytes, repo: str, commit: str) -> Iterator[RemoteFile]:
    """The files in a page of a listing. Raises BadReply for an entry that is not valid.

    Files with unprintable names are left out.

    Args:
        reply: The page as JSON.
        repo: The name of the repository.
        commit: The commit that was listed.
    """
    entries = _parse(reply)
    if not isinstance(entries, list):
        raise BadReply(f"{_brief(entries)}, expected a list of files")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(path := entry.get("path"), str):
            raise BadReply(f"{_brief(entry)} in a list of files")
        if entry.get("type") == "file" and path.isprintable():
            yield _file(entry, path, repo, commit)


def _file(entry: dict[str, Any], path: str, repo: str, commit: str) -> RemoteFile:
    if len(path) > _MAX_PATH or not is_plain_path(path):
        message = f"{repo} has a file {_brief(path)}, which would leave its folder"
        raise SkyrunError(message, "do not use it", MODEL_MISSING)
    size, lfs = entry.get("size"), entry.get("lfs")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= _MAX_FILE:
        raise BadReply(f"{_brief(size)} as the size of {path}")
    sha256 = ""
    if lfs is not None:
        said = lfs.get("oid", lfs.get("sha256")) if isinstance(lfs, dict) else lfs
        if not isinstance(said, str) or not re.fullmatch("[0-9a-f]{64}", said):
            raise BadReply(f"{_brief(said)} as the SHA-256 of {path}")
        sha256 = said
    blob = entry.get("oid")
    if not is_commit(blob):
        raise BadReply(f"{_brief(blob)} as the SHA-1 of {path}")
    return RemoteFile(repo, commit, path, size, sha256, str(blob))


def _parse(reply: bytes) -> Any:
    try:
        return json.loads(reply)
    except (ValueError, RecursionError) as error:
        what = "nothing" if not reply.strip() else f"{_brief(reply.decode('utf-8', 'replace'))}, expected JSON"
        raise BadReply(what) from error


def _brief(value: object) -> str:
    """A one_line form of a value; of a long one, its beginning."""
    text = value if isinstance(value, str) else type(value).__name__ if isinstance(value, (list, dict)) else repr(value)
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def cached_repository(cache: Path, name: str, commit: str | None, branch: str) -> Repository | None:
    """The files of a repository in the cache of huggingface-hub; None if there are none.

    The cache names files by their checksums.

    Args:
        cache: The folder of the cache.
        name: The name of the repository.
        commit: The commit to list; None stands for the newest of the branch.
        branch: The branch.
    """
    folder = cache / f"models--{name.replace('/', '--')}"
    try:
        sha = commit or (folder / "refs" / branch).read_text().strip()
        if not is_commit(sha):
            return None
        paths = [path for path in (folder / "snapshots" / sha).rglob("*") if path.is_file()]
    except (OSError, ValueError):
        return None
    files = []
    for path in sorted(paths):
        blob = path.resolve().name
        if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob):  # otherwise the cache has no links, and no checksums
            inside = PurePosixPath(path.relative_to(folder / "snapshots" / sha).as_posix())
            sha256 = blob if len(blob) == 64 else ""
            files.append(RemoteFile(name, sha, str(inside), path.stat().st_size, sha256, "" if sha256 else blob))
    return Repository(name, sha, tuple(files)) if files else None
