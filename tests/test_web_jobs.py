"""The queue over HTTP: the order of jobs, processes that die, and what is kept of them."""

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs skyrun[web]")
pytest.importorskip("python_multipart", reason="needs skyrun[web]")
pytest.importorskip("httpx2", reason="needs httpx2")

from web_client import client, job_of, opened, picture, statuses, wanted
from web_server import stub_worker, wait_for

from skyrun.web.folder import Folder, Refused
from skyrun.web.jobs import Job
from skyrun.web.values import request_of

__all__ = ["client", "picture"]  # fixtures
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stub of a worker is a shell script")


def test_jobs_run_one_at_a_time_in_their_order(client):
    first, second, third = (job_of(client, seed=seed) for seed in (1, 2, 3))
    wait_for(lambda: statuses(client) == ["running", "waiting", "waiting"])
    assert client.patch(f"/api/jobs/{third}", json={"position": 0}).status_code == 200
    assert [job["id"] for job in client.get("/api/jobs").json()] == [first, third, second]
    assert client.patch(f"/api/jobs/{first}", json={"position": 1}).status_code == 409
    assert client.post(f"/api/jobs/{second}/pause").json()["status"] == "paused"
    assert client.post(f"/api/jobs/{first}/pause").json()["status"] == "stopping"
    wait_for(lambda: statuses(client) == ["running", "paused", "paused"])
    assert client.delete(f"/api/jobs/{third}").status_code == 202
    wait_for(lambda: statuses(client) == ["paused", "paused", "cancelled"])
    assert client.post(f"/api/jobs/{third}/pause").status_code == 409
    assert client.post(f"/api/jobs/{second}/resume").json()["status"] in ("waiting", "running")
    wait_for(lambda: statuses(client) == ["running", "paused", "cancelled"])
    for id in (first, third):
        assert client.delete(f"/api/jobs/{id}").status_code == 204
        assert client.get(f"/api/jobs/{id}").status_code == 404


def test_a_job_again_has_another_seed_and_what_is_changed(client):
    id = job_of(client, seed=1)
    again = client.post(f"/api/jobs/{id}/again", json={"prompt": "a lake"}).json()
    assert again["request"]["prompt"] == "a lake" and again["request"]["images"] == ["a.png"]
    assert again["request"]["seed"] != 1 and again["clip"] != client.get(f"/api/jobs/{id}").json()["clip"]
    assert client.post(f"/api/jobs/{id}/again", json={"seconds": -1}).status_code == 400
    assert client.post(f"/api/jobs/{id}/again", json=[]).status_code == 400


def test_two_clips_have_no_name_in_common(client, picture):
    (picture.parent / "there.mp4").write_bytes(b"a clip")
    (picture.parent / "begun.skyrun.safetensors").write_bytes(b"a state")
    for name in ("there.mp4", "begun.mp4"):
        answer = client.post("/api/jobs", json=wanted(output=name))
        assert answer.status_code == 409 and set(answer.json()["fields"]) == {"output"}
    job_of(client, output="mine.mp4")
    assert client.post("/api/jobs", json=wanted(output="mine.mp4")).status_code == 409
    clips = {client.get(f"/api/jobs/{job_of(client, seed=5)}").json()["clip"] for _ in range(3)}
    assert clips == {"r2v-5.mp4", "r2v-5-1.mp4", "r2v-5-2.mp4"}


def test_devices_work_side_by_side_but_one_that_is_not_named_may_be_any(client):
    for device in ("cuda:0", "cuda", "cuda:1", None, "cpu"):
        job_of(client, device=device)
    wait_for(lambda: statuses(client).count("running") == 3)
    at_work = {job["request"].get("device") for job in client.get("/api/jobs").json() if job["status"] == "running"}
    assert at_work == {"cuda:0", "cuda:1", "cpu"}


def test_two_hundred_jobs_wait_and_are_there_after_a_restart(client, picture, monkeypatch):
    ids = [job_of(client, seed=seed) for seed in range(200)]
    assert len({*ids}) == 200 and statuses(client).count("waiting") >= 199
    for _ in range(60):  # into the same gap again and again
        client.patch(f"/api/jobs/{client.get('/api/jobs').json()[2]['id']}", json={"position": 0})
    order = [job["id"] for job in client.get("/api/jobs").json()]
    assert sorted(order) == sorted(ids)
    (picture.parent / ".skyrun" / "jobs" / "torn.json").write_text('{"id": "torn", "val')
    client.__exit__(None, None, None)
    with opened(picture.parent) as later:
        wait_for(lambda: statuses(later)[0] == "running")
        assert [job["id"] for job in later.get("/api/jobs").json()] == order
    client.__enter__()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["kill -9 $$"], "ended by signal 9"),
        (["exit 3"], "exit code 3"),
        (["echo no json; exit 0"], "exit code 0"),
        (["""echo '{"event": "error", "message": "it is dark", "hint": "light", "code": 4}'; exit 4"""], "it is dark"),
    ],
)
def test_a_process_that_dies_costs_its_clip_alone(picture, monkeypatch, lines, words):
    stub_worker(picture.parent.parent, monkeypatch, *lines)
    with opened(picture.parent) as client:
        ids = [job_of(client, seed=seed) for seed in (1, 2)]
        wait_for(lambda: statuses(client) == ["failed", "failed"])
        for id in ids:
            error = client.get(f"/api/jobs/{id}").json()["error"]
            assert words in error["message"] and error["hint"]
        client.post(f"/api/jobs/{ids[0]}/resume")
        wait_for(lambda: statuses(client) == ["failed", "failed"])


def test_a_worker_that_does_not_stop_is_ended_by_a_second_request(picture, monkeypatch):
    stub_worker(picture.parent.parent, monkeypatch, "sleep 1000")
    with opened(picture.parent) as client:
        id = job_of(client)
        wait_for(lambda: statuses(client) == ["running"])
        client.delete(f"/api/jobs/{id}")
        assert client.get(f"/api/jobs/{id}").json()["status"] == "stopping"
        assert client.delete(f"/api/jobs/{id}").status_code == 202
        wait_for(lambda: statuses(client) == ["cancelled"])


def test_events_of_a_job_are_kept_and_told_again(picture, monkeypatch):
    said = [
        {"event": "stage_started", "stage": "denoise", "total": 4, "unit": "steps", "before": 1, "part": [2, 3]},
        {"event": "block_done", "index": 1, "total": 4},
        {"event": "progress", "stage": "denoise", "done": 2},
        {"event": "time_left", "seconds": 9.0},
        {"event": "notice", "text": "memory is short"},
        {"event": "result", "output": "x.mp4"},
    ]
    stub_worker(picture.parent.parent, monkeypatch, *(f"echo '{json.dumps(event)}'" for event in said), "exit 0")
    with opened(picture.parent) as client:
        id = job_of(client)
        wait_for(lambda: statuses(client) == ["done"])
        progress = client.get(f"/api/jobs/{id}").json()["progress"]
        assert (progress["stage"], progress["done"], progress["total"], progress["part"]) == ("denoise", 2, 4, [2, 3])
        assert progress["left"] == 9.0 and progress["notices"] == ["memory is short"]
        for _ in range(2):
            lines = client.get(f"/api/jobs/{id}/events").text.split("\n\n")
            told = [json.loads(line.removeprefix("data: ")) for line in lines if line]
            assert told == [event for event in said if event["event"] != "block_done"] + [
                {"event": "end", "status": "done"}
            ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "a"}', "null", '{"id": 1e999}', "[" * 100_000])
def test_a_damaged_file_is_no_job(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert Job.read(path) is None


def test_a_file_with_half_of_a_character_is_no_job(tmp_path):
    job = Job.new({"task": "r2v", "prompt": "\ud83d"}, "a.mp4", 2.0)
    job.write(tmp_path)
    assert Job.read(tmp_path / f"{job.id}.json") is None


@pytest.mark.parametrize("place", ["top", "progress"])
def test_a_job_of_another_version_is_left_alone(picture, place):
    folder = Folder(picture.parent)
    folder.create()
    upload = folder.inputs / "upload.png"
    upload.write_bytes(picture.read_bytes())
    os.utime(upload, (0, 0))
    Job.new({"task": "r2v", "images": ["upload.png"]}, "a.mp4", 2.0).write(folder.jobs)
    (path,) = folder.jobs.glob("*.json")
    said = json.loads(path.read_text())
    (said if place == "top" else said["progress"])["after"] = "another"
    path.write_text(json.dumps(said))
    content = path.read_bytes()
    with opened(picture.parent) as client:
        assert client.get("/api/jobs").json() == []
        assert client.app.app.state.page.queue.unread == [path]
    assert path.read_bytes() == content and upload.exists()


def test_a_field_of_another_version_is_refused(picture):
    with pytest.raises(Refused, match="unknown field 'colour'"):
        request_of({"task": "r2v", "prompt": "a sea", "colour": "red"}, Folder(picture.parent))


def test_a_job_is_what_it_was_when_it_is_read_again(tmp_path):
    job = Job.new({"task": "r2v"}, "a.mp4", 2.0)
    job.progress.take({"event": "notice", "text": "hello"})
    job.write(tmp_path)
    assert Job.read(tmp_path / f"{job.id}.json") == job
    for status in ("running", "stopping"):
        job.status = status
        job.write(tmp_path)
        assert Job.read(tmp_path / f"{job.id}.json").at_work
    assert not [path for path in Path(tmp_path).iterdir() if path.suffix != ".json"]
