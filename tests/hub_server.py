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

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_BYTES = 10_000  # files from this size on are in LFS


@dataclass
class Hub:
    """Repositories by name, each a folder. What disturbs may be set at any time.

    cut: {path: bytes} ends the connection after so many bytes of a response, once for each entry of a list. fail:
    {path: status}. damaged: paths whose content is wrong. ranges: whether they are served. token: that is asked for.
    gated: repositories with conditions. on_bytes: called with the path after every piece that was sent.
    """

    repos: dict = field(default_factory=dict)
    cut: dict = field(default_factory=dict)
    fail: dict = field(default_factory=dict)
    damaged: set = field(default_factory=set)
    ranges: bool = True
    token: str | None = None
    gated: set = field(default_factory=set)
    requests: list = field(default_factory=list)
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
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if (status := self.hub.fail.get(path.rpartition("/")[2])) is not None:
            return self._answer(status, b"{}", {})
        if match := re.fullmatch(r"api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            return self._api(match[1], match[2] or "")
        if match := re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(match[1], match[3], body)
        return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _refused(self, repo):
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return 401, {"X-Error-Code": "RepoNotFound"}
        if repo not in self.hub.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}
        if repo in self.hub.gated:
            return 403, {"X-Error-Code": "GatedRepo"}
        return None

    def _api(self, repo, what):
        if refused := self._refused(repo):
            return self._answer(refused[0], b"{}", refused[1])
        folder = self.hub.repos[repo]
        if what.startswith("/tree/"):
            entries = [_entry(path, folder) for path in sorted(folder.rglob("*"))]
            return self._answer(200, json.dumps(entries).encode(), {})
        return self._answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode(), {})

    def _file(self, repo, path, body):
        if refused := self._refused(repo):
            return self._answer(refused[0], b"{}", refused[1])
        place = self.hub.repos[repo] / path
        if not place.is_file():
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
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
        cuts = self.hub.cut.get(path)
        cut = cuts.pop(0) if body and cuts and stop - start > 100_000 else None
        return self._answer(status, content[start:stop], headers, cut)

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
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
