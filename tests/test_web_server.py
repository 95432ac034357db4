"""A server in a process of its own: real clips, clients that come and go, and ends of the server of all kinds."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs skyrun[web]")
pytest.importorskip("uvicorn", reason="needs skyrun[web]")

from web_server import Served, demo_request, served, wait_for

from skyrun.cli.main import main
from skyrun.media.video_writer import read_request
from skyrun.web.app import Page
from skyrun.web.folder import Folder

LONG = 900  # steps of a clip that is not finished before a test says so


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("web") / "clips") as server:
        yield server


@pytest.fixture(scope="module")
def made(server):
    """The job of a finished clip."""
    status, job = server.ask("POST", "/api/jobs", demo_request(server.folder))
    assert status == 201
    return server.until(job["id"], "done")


def pixels(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_clip_is_made_with_events_previews_and_a_log(server, made):
    clip = server.folder / made["clip"]
    assert len(pixels(clip)) == 17 and read_request(clip)["seed"] == 7
    progress = made["progress"]
    assert progress["plan"]["size"] == [48, 48] and progress["previews"] == 8 and progress["seconds"]["denoise"] > 0
    events = [*server.events(f"/api/jobs/{made['id']}/events")]
    names = [event["event"] for event in events]
    assert names[0] == "plan" and names[-2:] == ["result", "end"] and names.count("preview") == 8
    with Image.open(server.folder / ".skyrun" / "jobs" / made["id"] / "preview.webp") as preview:
        assert preview.n_frames == 5 and preview.size == (24, 24)
    assert server.ask("GET", f"/api/jobs/{made['id']}/preview")[0] == 200
    assert b"denoise: done" in server.ask("GET", f"/api/jobs/{made['id']}/log")[1]
    assert [*server.folder.glob("*.skyrun.*")] == []


def test_the_gallery_has_the_clip_with_its_settings(server, made):
    def known():
        (clip,) = [clip for clip in server.ask("GET", "/api/clips")[1] if clip["name"] == made["clip"]]
        return clip if clip["known"] else None

    clip = wait_for(known, "what is known of the clip")
    assert (clip["frames"], clip["height"], clip["fps"]) == (17, 192, 24)
    assert clip["request"]["images"] == ["star.png"] and clip["request"]["seed"] == 7
    assert "output" not in clip["request"] and "/" not in clip["request"]["model"]
    status, poster = server.ask("GET", f"/api/clips/{made['clip']}/poster")
    assert status == 200 and poster[8:12] == b"WEBP"
    status, part = server.ask("GET", f"/api/clips/{made['clip']}", Range="bytes=4-7")
    assert (status, part) == (206, b"ftyp")
    status, again = server.ask("POST", "/api/jobs", clip["request"])  # what it says is a request again
    assert status == 201
    assert server.until(again["id"], "done")["clip"] == "r2v-7-1.mp4"
    assert (pixels(server.folder / "r2v-7-1.mp4") == pixels(server.folder / made["clip"])).all()


def test_a_dropped_clip_says_how_it_was_made(server, made):
    status, said = server.ask("POST", "/api/files", (server.folder / made["clip"]).read_bytes())
    assert status == 201 and said["kind"] == "video" and said["request"]["prompt"] == made["request"]["prompt"]


def test_a_plan_is_made_for_the_picture_that_is_given(server, made):
    Image.new("RGB", (100, 200)).save(server.folder / "high.png")
    for images, is_high in (("images=high.png", True), ("", False)):
        status, plan = server.ask("GET", f"/api/plan?task=r2v&{images}")
        assert status == 200 and (plan["size"][0] > plan["size"][1]) is is_high
        assert plan["fetch"]["model"] == "r2v" and "prompt" in plan["problems"]
    status, plan = server.ask("GET", "/api/plan?task=r2v&max_ram=0.1")
    assert status == 200 and "needs" in plan["plan"]["problem"]
    status, plan = server.ask("GET", "/api/plan?task=r2v&model=demo&size=480x832")
    assert status == 400 and "48x48" in plan["message"]


def test_two_clients_see_the_same_and_a_slow_one_stops_nothing(server, made):
    slow = socket.create_connection(("127.0.0.1", server.port))
    slow.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")  # and never reads
    streams = [server.events("/api/events") for _ in range(2)]
    for stream in streams:
        assert made["id"] in {job["id"] for job in next(stream)["jobs"]}
    _, job = server.ask("POST", "/api/jobs", demo_request(server.folder, seed=8))
    for stream in streams:
        seen = []
        for message in stream:
            if message["event"] == "job" and message["job"]["id"] == job["id"]:
                seen.append(message["job"]["status"])
                if seen[-1] == "done":
                    break
        assert "running" in seen
        stream.close()
    slow.close()


def test_a_paused_clip_goes_on_from_its_step_and_a_cancelled_one_is_gone(server, made):
    _, job = server.ask("POST", "/api/jobs", demo_request(server.folder, seed=9, steps=LONG))
    before = server.until(job["id"], "running", step=3)["progress"]["done"]
    server.ask("POST", f"/api/jobs/{job['id']}/pause")
    server.until(job["id"], "paused")
    assert [*server.folder.glob("r2v-9.skyrun.*")]
    server.ask("POST", f"/api/jobs/{job['id']}/resume")

    def starts():
        found = [event["before"] for event in _events(server, job) if event.get("unit") == "steps"]
        return found if len(found) > 1 else None

    first, second = wait_for(starts, "the second start")
    assert first == 0 and second >= before
    server.until(job["id"], "running", step=second + 1)
    assert server.ask("DELETE", f"/api/jobs/{job['id']}")[0] == 202
    server.until(job["id"], "cancelled")
    assert server.ask("DELETE", f"/api/jobs/{job['id']}")[0] == 204
    assert [*server.folder.glob("r2v-9*")] == [] and not (server.folder / ".skyrun" / "jobs" / job["id"]).exists()


def _events(server, job):
    path = server.folder / ".skyrun" / "jobs" / job["id"] / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_deleted_clip_takes_its_job_with_it(server, made):
    _, job = server.ask("POST", "/api/jobs", demo_request(server.folder, seed=10))
    server.until(job["id"], "done")
    assert server.ask("DELETE", f"/api/clips/{job['clip']}")[0] == 204
    assert server.ask("GET", f"/api/jobs/{job['id']}")[0] == 404
    assert not (server.folder / job["clip"]).exists()


def test_a_failure_is_told_as_the_command_line_tells_it(server, made):
    request = demo_request(server.folder, prompt="a red star", seed=11, frames=801)
    _, job = server.ask("POST", "/api/jobs", request)
    error = wait_for(lambda: server.job(job["id"])["error"])
    assert "no clips of 801 frames" in error["message"] and error["code"] == 2 and error["hint"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_restarted_server_goes_on_where_it_was(tmp_path, end):
    folder = tmp_path / "clips"
    first = Served(folder)
    try:
        ids = [first.ask("POST", "/api/jobs", demo_request(folder, seed=n, steps=LONG))[1]["id"] for n in (1, 2)]
        done = first.until(ids[0], "running", step=3)["progress"]["done"]
        (worker,) = [p for p in psutil.Process(first.process.pid).children() if "skyrun.web.worker" in p.cmdline()]
    finally:
        first.process.send_signal(end)
        first.process.wait(60)
        first.process.stderr.close()
    with served(folder) as second:
        assert [job["id"] for job in second.ask("GET", "/api/jobs")[1]] == ids

        def starts():
            return [event["before"] for event in _events(second, {"id": ids[0]}) if event.get("unit") == "steps"]

        first_start, second_start = wait_for(lambda: starts() if len(starts()) > 1 else None, "a second start")
        assert first_start == 0 and second_start >= done
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_the_server_is_small_and_its_helper_ends(tmp_path):
    with served(tmp_path / "clips") as server:
        assert server.ask("GET", "/")[0] == 200 and server.ask("GET", "/api/form")[0] == 200
        assert psutil.Process(server.process.pid).memory_info().rss < 60e6
        assert psutil.Process(server.process.pid).children() == []


@pytest.mark.skipif(sys.platform == "win32", reason="the stub of a helper is a shell script")
def test_an_idle_helper_ends_and_comes_back(tmp_path, monkeypatch):
    import asyncio

    from skyrun.web.helped import Helper

    script = tmp_path / "helper.sh"
    script.write_text('#!/bin/sh\nwhile read line; do echo "{\\"answer\\": {\\"pid\\": $$}}"; done\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

    async def ask():
        helper = Helper(rest=0.2)
        pids = [(await helper.ask("anything"))["pid"] for _ in range(2)]
        assert pids[0] == pids[1] and helper.running
        while helper.running:
            await asyncio.sleep(0.05)
        several = await asyncio.gather(*(helper.ask("anything") for _ in range(5)))
        assert {answer["pid"] for answer in several}.isdisjoint(pids) and len({a["pid"] for a in several}) == 1
        helper.close()
        return pids[0]

    pid = asyncio.run(ask())
    wait_for(lambda: not psutil.pid_exists(pid))


def test_a_second_server_for_a_folder_or_a_port_is_refused(tmp_path, capsys):
    with served(tmp_path / "clips") as server:
        assert main(["web", "--folder", str(tmp_path / "clips"), "--port", "0"]) == 2
        assert "another skyrun web serves" in capsys.readouterr().err
        assert main(["web", "--folder", str(tmp_path / "other"), "--port", str(server.port)]) == 2
        assert "cannot be listened at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "needs a token"),
        (["--host", "0.0.0.0", "--token", "short"], "guessed"),
        (["--port", "99999"], "cannot be listened at"),
        (["--host", "no.such.host.invalid", "--token", "long enough"], "cannot be listened at"),
        (["--folder", "/dev/null/x"], "cannot hold clips"),
    ],
)
def test_wrong_options_are_a_sentence(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["web", *options]) == 2
    assert words in capsys.readouterr().err


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['uvicorn'] = None; from skyrun.cli import main; raise SystemExit(main(['web']))"
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "pip install 'skyrun[web]'" in done.stderr and "Traceback" not in done.stderr


def test_a_token_opens_a_page_on_the_network(tmp_path):
    with served(tmp_path / "clips", "--host", "0.0.0.0", "--token", "a long token") as server:
        assert server.ask("GET", "/api/jobs")[0] == 401
        assert server.ask("GET", "/api/jobs", Authorization="Bearer a long token", Host="my.machine:1")[0] == 200


def test_the_docs_list_every_route(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "web.md").read_text()
    shown = re.findall(r"^\| `([A-Z]+)` \| `(/api/[^`]*)`", text, re.M)
    routes = Page(Folder(tmp_path), 1.0).routes()
    there = [(method, route.path) for route in routes for method in route.methods - {"HEAD"}]
    named = [(method, re.sub("ID|NAME", lambda name: f"{{{name[0].lower()}}}", path)) for method, path in shown]
    there = [(method, path.replace(":path", "")) for method, path in there]
    assert sorted(named) == sorted((method, path) for method, path in there if path.startswith("/api/"))
