"""A page that is served, and workers that do as a test wants."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from urllib.parse import urlsplit

PATIENCE = 90  # seconds until a test gives up; the machine may be busy


def wait_for(look, what="it"):
    """What `look` returns as soon as that is something."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come")


class Served:
    """A server in a process of its own."""

    def __init__(self, folder, *options, port=0):
        command = [sys.executable, "-m", "skyrun", "web", "--port", str(port), "--folder", str(folder), *options]
        self.folder = folder
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.said = self.process.stderr.readline()
        self.address = (re.search(r"http://\S+", self.said) or [""])[0]
        self.port = urlsplit(self.address).port

    def ask(self, method, path, body=None, **headers):
        """The status and the body of an answer, parsed if it is JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        if isinstance(body, (dict, list)):
            body, headers = json.dumps(body), {"Content-Type": "application/json"} | headers
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(content) if is_json else content

    def job(self, id):
        return self.ask("GET", f"/api/jobs/{id}")[1]

    def until(self, id, *statuses, step=0):
        """The job, as soon as it has one of these statuses, and so many steps are done."""

        def look():
            job = self.job(id)
            assert job["status"] in statuses or job["status"] != "failed", job["error"]
            return job if job["status"] in statuses and job["progress"]["done"] >= step else None

        return wait_for(look, f"{statuses} of {id}")

    def events(self, path):
        """Messages of a stream as they come, for a client that reads."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", path)
        try:
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        finally:
            connection.close()

    def stop(self):
        """Stop it as Ctrl-C does."""
        self.process.terminate()
        self.process.wait(PATIENCE)
        self.process.stderr.close()


@contextmanager
def served(folder, *options, port=0):
    server = Served(folder, *options, port=port)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def demo_request(folder, **changes):
    """Values of a job that the built-in model makes; what it is made from is put into the folder."""
    import numpy as np
    from PIL import Image

    from skyrun.demo.world import sprite_picture, tint

    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    picture = sprite_picture("star", tint("red", draw), (48, 48))
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(folder / "star.png")
    values = {"task": "r2v", "model": "demo", "prompt": "a red star moves up on white", "images": ["star.png"]}
    return values | {"seed": 7} | changes


# In place of Python: runs until its stdin ends, as a worker does; what is no worker is Python.
_STUB = """#!/bin/sh
if [ "$2" = skyrun.web.worker ]; then {lines}
exec cat > /dev/null; fi
exec {python} "$@"
"""


def stub_worker(folder, monkeypatch, *lines):
    """Let workers be a script that first runs these lines of sh, and then waits for the end of its stdin."""
    script = folder / "stub.sh"
    script.write_text(_STUB.format(lines="\n".join(lines) or ":", python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return os.fspath(script)
