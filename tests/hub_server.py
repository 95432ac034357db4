"""A small hub on this machine: the part of the Hugging Face Hub's protocol for downloads, and ways to disturb it."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_BYTES = 10_000  # files from this size on are in LFS


@dataclass
class Hub:
    """Repositories by name, each a folder. What disturbs may be set at any time.

    cut: {path: list of bytes} ends the connection after so many bytes of a response, once for each entry. fail:
    {file name: status}. damaged: paths whose content is wrong; short: those of which only the first half is sent.
    ranges: whether they are served. token: that is asked for. gated: repositories with conditions. redirect: whether
    files come from another host, as large ones do from a CDN. stall: {path: bytes} sends no more of it after so many.
    more_entries: of every listing. replies: {"model" or "tree": body, (body, headers), or what makes one of
    the query} instead of what is right.
    refused: {repository: status}, with error_body. requests: method, path and range of each. tokens: sent along, by
    host and path.
    """

    repos: dict = field(default_factory=dict)
    cut: dict = field(default_factory=dict)
    fail: dict = field(default_factory=dict)
    damaged: set = field(default_factory=set)
    short: set = field(default_factory=set)
    ranges: bool = True
    token: str | None = None
    gated: set = field(default_factory=set)
    redirect: bool = False
    stall: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    tokens: dict = field(default_factory=dict)
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    more_entries: list = field(default_factory=list)
    replies: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)
    error_body: bytes = b"{}"
    commit: str = COMMIT
    url: str = ""

    def asked(self, path, method="GET"):
        """The ranges that were asked for of a file, "" for the whole."""
        return [bounds for kind, at, bounds in self.requests if kind == method and at.endswith(path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve(body=True)

    def do_HEAD(self):
        self._serve(body=False)

    def _serve(self, body):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        host = self.headers["Host"].partition(":")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        self.hub.tokens[host, path] = self.headers.get("Authorization")
        if (status := self.hub.fail.get(path.rpartition("/")[2])) is not None:
            return self._answer(status, b"{}", {})
        if match := re.fullmatch(r"api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            return self._api(match[1], match[2] or "")
        if match := re.fullmatch(r"cdn/([^/]+/[^/]+)/(.+)", path):
            return self._content(match[1], match[2], body)
        if match := re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(match[1], match[3], body)
        return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _refused(self, repo):
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return 401, {"X-Error-Code": "RepoNotFound"}
        if repo not in self.hub.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}
        if repo in self.hub.refused:
            return self.hub.refused[repo], {}
        if repo in self.hub.gated:
            return 403, {"X-Error-Code": "GatedRepo"}
        return None

    def _api(self, repo, what):
        if refused := self._refused(repo):
            return self._answer(refused[0], self.hub.error_body, refused[1])
        folder = self.hub.repos[repo]
        instead = self.hub.replies.get("tree" if what.startswith("/tree/") else "model")
        if callable(instead):
            instead = instead(urlsplit(self.path).query)
        if instead is not None:
            body, headers = instead if isinstance(instead, tuple) else (instead, {})
            return self._answer(200, body, headers)
        if what.startswith("/tree/"):
            if what.removeprefix("/tree/") != self.hub.commit:
                return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            entries = [*self.hub.more_entries, *(_entry(path, folder) for path in sorted(folder.rglob("*")))]
            return self._answer(200, json.dumps(entries).encode(), {})
        return self._answer(200, json.dumps({"id": repo, "sha": self.hub.commit, "siblings": []}).encode(), {})

    def _file(self, repo, path, body):
        if refused := self._refused(repo):
            return self._answer(refused[0], self.hub.error_body, refused[1])
        if not (self.hub.repos[repo] / path).is_file():
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if self.hub.redirect and body:
            port = self.server.server_port
            return self._answer(302, b"", {"Location": f"http://localhost:{port}/cdn/{repo}/{path}"})
        return self._content(repo, path, body)

    def _content(self, repo, path, body):
        place = self.hub.repos[repo] / path
        content = place.read_bytes()
        digest = _oid(content)
        if path in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if len(content) >= LFS_BYTES:
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        status, start, stop = 200, 0, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.hub.ranges:
            start, stop = int(asked[1]), min(len(content), int(asked[2] or len(content)) + 1)
            if start >= len(content):
                return self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        if path in self.hub.short:
            stop = max(start, min(stop, len(content) // 2))
        cuts = self.hub.cut.get(path)
        cut = cuts.pop(0) if body and cuts and stop - start > 100_000 else None
        if path in self.hub.stall and body and stop - start > 100_000:
            return self._stall(status, content[start:stop], headers, self.hub.stall.pop(path))
        return self._answer(status, content[start:stop], headers, cut)

    def _stall(self, status, content, headers, sent):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:sent])
        self.hub.stalled.set()
        self.hub.go_on.wait(30)
        self.close_connection = True

    def _answer(self, status, content, headers, cut=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.close_connection = True


def _oid(content):
    if len(content) >= LFS_BYTES:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(path: Path, folder):
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    content = path.read_bytes()
    entry = {"type": "file", "path": name, "oid": _oid(content)[:40], "size": len(content)}
    if len(content) >= LFS_BYTES:
        entry["lfs"] = {"oid": _oid(content), "size": len(content), "pointerSize": 134}
    return entry


@contextmanager
def serving():
    """A hub that listens on a port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # of a client that has heard enough
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def gguf_repository(hub, folder, *models, parts="*"):
    """A repository OWNER/GGUF of converted models."""
    folder.mkdir()
    for model in models:
        for path in model.glob(parts):
            if path.is_file() and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    hub.repos["owner/gguf"] = folder


def community_file(source, place, write_gguf, **metadata):
    """A converted file as others publish it: only the metadata that is given, modulation with two axes."""
    from skyrun.kernels.files.gguf_file import open_gguf

    file = open_gguf(source)
    tensors = {}
    for name, info in file.tensors.items():
        shape = info.shape[1:] if name.endswith("modulation") else info.shape
        tensors[name] = torch.frombuffer(file.read(info), dtype=torch.uint8).view(*shape[:-1], -1)
    place.parent.mkdir(parents=True, exist_ok=True)
    said = {key.replace("__", "."): value for key, value in metadata.items()}
    types = {name: info.format.name for name, info in file.tensors.items()}
    write_gguf(place, tensors, {"general.architecture": file.architecture} | said, types)
