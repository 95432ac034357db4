"""The page over HTTP: errors of every route, who may ask, and what a body may be."""

import json
import os
import sys
from dataclasses import MISSING, fields
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs skyrun[web]")
pytest.importorskip("python_multipart", reason="needs skyrun[web]")
pytest.importorskip("httpx2", reason="needs httpx2")

from web_client import BASE, client, opened, picture, statuses, wanted
from web_server import wait_for

from skyrun.media.video_writer import Format, writing_video
from skyrun.planning.request import Request
from skyrun.web.app import PAGE
from skyrun.web.folder import Folder
from skyrun.web.form import form
from skyrun.web.values import FIELDS, again, from_texts, kind, problems, request_of

__all__ = ["client", "picture"]  # fixtures
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stub of a worker is a shell script")
ERRORS = [
    ("GET", "/nothing", None, 404, "/nothing"),
    ("GET", "/page/../app.py", None, 404, "app.py"),
    ("GET", "/page/..%2fapp.py", None, 404, "app.py"),
    ("DELETE", "/", None, 405, "Method"),
    ("GET", "/api/plan", None, 400, "unknown task"),
    ("GET", "/api/plan?task=r2v&seconds=-1", None, 400, "-1 seconds"),
    ("GET", "/api/plan?task=r2v&seconds=long", None, 400, "expected a number"),
    ("GET", "/api/plan?task=r2v&colour=red", None, 400, "colour"),
    ("GET", "/api/jobs/1", None, 404, "no job '1'"),
    ("GET", "/api/jobs/..%2f..", None, 404, ""),
    ("DELETE", "/api/jobs/1", None, 404, "no job"),
    ("PATCH", "/api/jobs/1", {"position": 0}, 404, "no job"),
    ("PATCH", "/api/jobs/1", {"position": "first"}, 400, "whole number"),
    ("PATCH", "/api/jobs/1", {"position": True}, 400, "whole number"),
    ("PATCH", "/api/jobs/1", [], 400, "whole number"),
    ("POST", "/api/jobs/1/pause", None, 404, "no job"),
    ("POST", "/api/jobs/1/resume", None, 404, "no job"),
    ("POST", "/api/jobs/1/again", None, 404, "no job"),
    ("GET", "/api/jobs/1/events", None, 404, "no job"),
    ("GET", "/api/jobs/1/log", None, 404, "no job"),
    ("GET", "/api/jobs/1/preview", None, 404, "no job"),
    ("POST", "/api/jobs", {}, 400, "unknown task"),
    ("POST", "/api/jobs", [], 400, "list"),
    ("POST", "/api/jobs", "r2v", 400, "str"),
    ("POST", "/api/jobs", wanted(prompt=""), 400, "prompt is empty"),
    ("POST", "/api/jobs", wanted(prompt=7), 400, "expected text"),
    ("POST", "/api/jobs", wanted(images=[]), 400, "expected 1 to 4"),
    ("POST", "/api/jobs", wanted(images=["b.png"]), 400, "no 'b.png'"),
    ("POST", "/api/jobs", wanted(images=["../a.png"]), 400, "no '../a.png'"),
    ("POST", "/api/jobs", wanted(images=["/etc/passwd"]), 400, "no '/etc/passwd'"),
    ("POST", "/api/jobs", wanted(images=[".skyrun/lock"]), 400, "no '.skyrun/lock'"),
    ("POST", "/api/jobs", wanted(images=["a\0.png"]), 400, "in"),
    ("POST", "/api/jobs", wanted(images=["x" * 5000]), 400, "in"),
    ("POST", "/api/jobs", wanted(images=[7]), 400, "expected a path"),
    ("POST", "/api/jobs", wanted(model="/etc"), 400, "/etc"),
    ("POST", "/api/jobs", wanted(model="no such thing"), 400, "no such thing"),
    ("POST", "/api/jobs", wanted(output="../x.mp4"), 400, "not the name of a file"),
    ("POST", "/api/jobs", wanted(output="x.png"), 400, "not the name of a file"),
    ("POST", "/api/jobs", wanted(output=".hidden.mp4"), 400, "not the name of a file"),
    ("POST", "/api/jobs", wanted(overwrite=True), 400, "overwrite"),
    ("POST", "/api/jobs", wanted(colour="red"), 400, "colour"),
    ("POST", "/api/jobs", wanted(seed=-1), 400, "seed -1"),
    ("POST", "/api/jobs", wanted(quant="Q7_K"), 400, "unknown type 'Q7_K', expected F32, F16"),
    ("POST", "/api/jobs", wanted(quant="../Q8_0"), 400, "unknown type"),
    ("GET", "/api/plan?task=r2v&quant=Q7_K", None, 400, "unknown type 'Q7_K'"),
    ("POST", "/api/jobs", wanted(size="1x1"), 400, "grid"),
    ("POST", "/api/jobs", wanted(video="a.png"), 400, "takes no --video"),
    ("POST", "/api/jobs", wanted(frames=5, seconds=1), 400, "one of them"),
    ("POST", "/api/files", None, 400, "empty"),
    ("GET", "/api/files/nothing.png", None, 404, "no file"),
    ("GET", "/api/files/..%2f..%2fa.png", None, 404, "no file"),
    ("GET", "/api/files/.skyrun/lock", None, 404, "no file"),
    ("GET", "/api/files//etc/hostname", None, 404, "no file"),
    ("GET", "/api/files/%2fetc%2fhostname", None, 404, "no file"),
    ("GET", "/api/clips/none.mp4", None, 404, "no clip"),
    ("GET", "/api/clips/a.png", None, 404, "no clip"),
    ("GET", "/api/clips/..%2fa.mp4", None, 404, ""),
    ("GET", "/api/clips/.skyrun", None, 404, "no clip"),
    ("GET", "/api/clips/none.mp4/poster", None, 404, "no clip"),
    ("DELETE", "/api/clips/none.mp4", None, 404, "no clip"),
    ("DELETE", "/api/clips/a.png", None, 404, "no clip"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "words"), ERRORS)
def test_errors_are_a_sentence_a_hint_and_a_code(client, method, path, body, status, words):
    answer = client.request(method, path, json=body) if body is not None else client.request(method, path)
    assert answer.status_code == status, answer.text
    said = answer.json()
    assert {"message", "hint", "code"} <= set(said) <= {"message", "hint", "code", "fields"}
    assert words in said["message"] and said["code"] in (1, 2)
    assert statuses(client) == []


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"task": NaN'])
def test_a_body_that_is_no_json(client, body):
    answer = client.post("/api/jobs", content=body)
    assert (answer.status_code, "not JSON" in answer.json()["message"]) == (400, True)


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({"prompt": "", "seconds": 900}, {"prompt", "seconds"}),
        ({"images": [], "seed": -1, "steps": 0}, {"images", "seed", "steps"}),
        ({"task": "none"}, {"task"}),
        ({"task": "v2v", "images": [], "transition": "cut-in"}, {"video", "transition"}),
        ({"seed": "x", "quant": 8, "join": 3}, {"seed", "quant", "join"}),
        ({"resolution": "9P"}, {"resolution"}),
        ({"quant": "many"}, {"quant"}),
        ({"prompt": "\ud83d", "quant": "\ud83d"}, {"prompt", "quant"}),
        ({"size": "wide"}, {"size"}),
        ({"max_vram": -1, "device": "tpu", "prefer": "beauty"}, {"max_vram", "device", "prefer"}),
        ({"images": ["b.png"], "dtype": "int3"}, {"images", "dtype"}),
    ],
)
def test_every_problem_is_told_at_its_field(client, values, fields):
    answer = client.post("/api/jobs", content=json.dumps(wanted(**values)))
    said = answer.json()
    assert answer.status_code == 400 and set(said["fields"]) == fields
    assert all(text in said["message"] for texts in said["fields"].values() for text in texts)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:9999"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "evil.example:7860"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"origin": BASE}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:7861"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "chrome-extension://127.0.0.1:7860"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_pages_of_others_may_not_ask(client, headers, status):
    for method, path in (("GET", "/api/jobs"), ("GET", "/api/clips"), ("POST", "/api/jobs")):
        answer = client.request(method, path, headers=headers)
        assert (answer.status_code == 403) is (status == 403), (method, answer.text)


TOKEN = "a long token"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/jobs", {}, 401),
        ("/", {}, 401),
        ("/page/main.js", {}, 401),
        ("/api/jobs", {"authorization": f"Bearer {TOKEN}"}, 200),
        ("/api/jobs", {"authorization": f"bearer {TOKEN}"}, 200),
        ("/api/jobs", {"authorization": TOKEN}, 401),
        ("/api/jobs", {"authorization": "Bearer another"}, 401),
        ("/api/jobs", {"authorization": "Bearer "}, 401),
        ("/api/jobs", {"authorization": "Bearer \u00e4".encode("latin-1")}, 401),
        ("/api/jobs?token=a+long+token", {}, 200),
        ("/api/jobs?token=another", {}, 401),
        ("/api/jobs?token=", {}, 401),
        ("/api/jobs", {"cookie": f"skyrun-7860={TOKEN}"}, 401),
        ("/api/jobs", {"cookie": b"skyrun-7860=\x80;="}, 401),
        ("/?token=a%20long%20token", {}, 303),
    ],
)
def test_a_token_is_asked_for(tmp_path, path, headers, status):
    with opened(tmp_path / "clips", TOKEN, ()) as client:
        assert client.get(path, headers=headers).status_code == status


def test_a_token_becomes_a_cookie_and_leaves_the_address(tmp_path):
    with opened(tmp_path / "clips", TOKEN, ()) as client:
        answer = client.get("/?token=a+long+token&x=1")
        cookie = answer.headers["set-cookie"].lower()
        assert answer.headers["location"] == "/?x=1"
        assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
        assert client.get("/api/jobs").status_code == 200  # the client keeps its cookies


@pytest.mark.parametrize(
    ("path", "headers", "size", "status"),
    [
        ("/api/jobs", {"content-type": "application/json"}, (256 << 10) + 1, 413),
        ("/api/jobs", {"content-length": "99999999999999"}, 1, 413),
        ("/api/files", {"content-length": str((4 << 30) + 1)}, 1, 413),
        ("/api/files", {"content-length": "-1"}, 1, 413),
        ("/api/jobs", {"content-type": "multipart/form-data; boundary=x", "content-length": str(5 << 30)}, 1, 413),
        ("/api/jobs", {"content-type": "multipart/form-data"}, 10, 400),
        ("/api/jobs", {"content-type": "multipart/form-data; boundary=x"}, 10, 400),
    ],
)
def test_bodies_are_bounded(client, path, headers, size, status):
    assert client.post(path, headers=headers, content=b"x" * size).status_code == status


def test_a_body_of_unknown_length_is_counted(client):
    answer = client.post("/api/jobs", content=(b"x" * 65536 for _ in range(8)))
    assert answer.status_code == 413


def test_uploads_are_looked_into_and_named_by_us(client, picture):
    answer = client.post("/api/files", content=picture.read_bytes())
    said = answer.json()
    assert answer.status_code == 201 and said["kind"] == "image" and (said["height"], said["width"]) == (48, 64)
    stored = client.get(f"/api/files/{said['file']}")
    assert stored.content == picture.read_bytes() and stored.headers["content-type"] == "image/png"
    assert client.post("/api/files", content=picture.read_bytes()).json()["file"] == said["file"]
    for hostile in (b"<svg onload='alert(1)'/>", b"MZ" + bytes(500), b"#!/bin/sh\nexit 1", picture.read_bytes()[:60]):
        refused = client.post("/api/files", content=hostile)
        assert refused.status_code == 400 and str(picture.parent) not in refused.text
    kept = [path.name for path in (picture.parent / ".skyrun" / "inputs").iterdir()]
    assert kept == [said["file"]]


def test_names_of_files_in_a_form_are_not_used(client, picture):
    parts = {"task": "r2v", "prompt": "a <b>sea</b>", "seed": "4"}
    for name in ("../../x.png", "..\\x.png", 'x.png"\r\nX: y', "<b>.png"):
        answer = client.post("/api/jobs", data=parts, files={"images": (name, picture.read_bytes(), "image/png")})
        (kept,) = answer.json()["request"]["images"]
        assert answer.status_code == 201 and kept[:-4].isalnum() and kept.endswith(".png")
        assert answer.json()["request"]["prompt"] == "a <b>sea</b>"
        assert sorted(path.name for path in picture.parent.iterdir()) == [".skyrun", "a.png"]


def test_files_of_a_form_are_of_their_kind(client, picture):
    for field, words in (("video", "expected video"), ("audio", "expected audio"), ("output", "unknown file")):
        answer = client.post("/api/jobs", data={"task": "r2v"}, files={field: ("a.png", picture.read_bytes())})
        assert answer.status_code == 400 and words in answer.json()["message"]


def test_the_page_is_small_strict_and_alone(client):
    total = 0
    for path in PAGE.iterdir():
        answer = client.get("/" if path.name == "index.html" else f"/page/{path.name}")
        assert answer.status_code == 200 and answer.content == path.read_bytes()
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        text = path.read_text().replace("http://www.w3.org/", "")
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text and "style=" not in text
        total += path.stat().st_size
    assert total < 100_000


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [
        (None, 200, b"0123456789"),
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=0-99", 206, b"0123456789"),
        ("bytes=10-", 416, None),
        ("bytes=5-2", 400, None),
        ("lines=1-2", 400, None),
    ],
)
def test_ranges_of_a_clip(client, picture, asked, status, content):
    (picture.parent / "was it?.mp4").write_bytes(b"0123456789")
    answer = client.get("/api/clips/was%20it%3F.mp4", headers={"range": asked} if asked else {})
    assert answer.status_code == status and (content is None or answer.content == content)
    assert answer.headers["content-security-policy"]


def test_clips_are_listed_by_name_and_deleted_with_their_pictures(client, picture):
    for name in ("a.mp4", "<i>.mp4", "\u00e9.mp4", ".hidden.mp4"):
        (picture.parent / name).write_bytes(b"no video")
    (picture.parent / "folder.mp4").mkdir()

    def listed():
        clips = client.get("/api/clips").json()
        return {clip["name"]: clip for clip in clips} if all(clip["known"] for clip in clips) else None

    clips = wait_for(listed, "what is known of the clips")
    assert set(clips) == {"a.mp4", "<i>.mp4", "\u00e9.mp4"}
    assert all("not a readable video" in clip["problem"] for clip in clips.values())
    assert client.get("/api/clips/a.mp4/poster").status_code == 404
    for name in ("a.mp4", "%3Ci%3E.mp4", "%C3%A9.mp4"):
        assert client.delete(f"/api/clips/{name}").status_code == 204
    assert client.get("/api/clips").json() == [] and (picture.parent / "folder.mp4").is_dir()
    assert [*(picture.parent / ".skyrun" / "posters").iterdir()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_what_is_no_utf_8_ends_no_listing(client, picture):
    strange = picture.parent / os.fsdecode(b"caf\xe9.mp4")
    strange.write_bytes(b"no video")
    with writing_video(picture.parent / "a.mp4", Format(32, 48, Fraction(24), {"prompt": "caf\udce9"})) as writer:
        writer.add(np.zeros((1, 32, 48, 3), np.uint8))

    def listed():
        clips = client.get("/api/clips").json()
        return {clip["name"]: clip for clip in clips} if all(clip["known"] for clip in clips) else None

    clips = wait_for(listed, "what is known of the clips")
    assert set(clips) == {"caf?.mp4", "a.mp4"} and clips["a.mp4"]["request"]["prompt"] == "caf?"
    assert client.get("/api/clips/a.mp4/poster").status_code == client.get("/api/form").status_code == 200
    strange.unlink()
    assert client.delete("/api/clips/a.mp4").status_code == 204


def test_another_task_takes_over_what_means_the_same():
    before = {"task": "t2v", "prompt": "a sea", "seed": 3, "steps": 9, "guidance": 2.0, "shift": 3.0, "prefer": "speed"}
    assert again(before, {"steps": 4}) == {name: before[name] for name in before if name != "seed"} | {"steps": 4}
    assert again(before, {"task": "r2v"}) == {"task": "r2v", "prompt": "a sea", "prefer": "speed"}


def test_values_become_the_request_they_state(picture):
    folder = Folder(picture.parent)
    texts = [("task", "r2v"), ("prompt", "a sea"), ("images", "a.png"), ("images", "a.png"), ("steps", "4")]
    texts += [("seconds", "2.5"), ("join", "on"), ("size", "480x832"), ("quant", "q6_k"), ("seed", ""), ("dtype", " ")]
    values = from_texts(texts)
    assert request_of(values, folder) == Request(
        "r2v", "a sea", (picture, picture), steps=4, seconds=2.5, join=True, size=(480, 832), quant="Q6_K"
    )
    assert set(problems(values, folder)) == {"join"}


def test_the_form_asks_for_every_field_of_a_request(picture):
    asked = {field["name"]: field for field in form(Folder(picture.parent))["fields"]}
    hidden = {"output", "save_latents", "overwrite", "condition_frames", "latent_rate", "window_frames"}
    assert set(asked) == {field.name for field in fields(Request)} - hidden
    kinds = {"task": "text", "images": "files", "seconds": "number", "seed": "whole", "join": "flag", "size": "size"}
    assert {name: kind(name) for name in kinds} == kinds and kind("video") == "file"
    assert asked["max_vram"]["hint"] == "Limits in GiB" and "quality" in asked["prefer"]["choices"]
    assert asked["join"]["tasks"] == ["v2v", "shot"]
    assert [name for name, field in FIELDS.items() if field.default is MISSING] == ["task", "prompt"]


def test_the_plan_of_a_model_that_is_not_here_is_its_own_and_counts_all_of_it(tmp_path):
    from skyrun.web.helper import plan

    said = plan(str(tmp_path), {"task": "i2v", "prompt": "x", "model": "wan2.1-i2v-480p"}, None)
    assert (said["frames"], said["fps"], said["fetch"]["model"]) == (81, 16, "wan2.1-i2v-480p")
    assert [*said["model_bytes"]] == ["transformer", "text encoder", "autoencoder", "image encoder"]
