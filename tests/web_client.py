"""A client of the page's server, without a browser, and what it asks for."""

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from web_server import stub_worker

from skyrun.web.app import application
from skyrun.web.folder import Folder

BASE = "http://127.0.0.1:7860"


def opened(folder, token="", hosts=("127.0.0.1", "localhost", "::1"), **headers):
    place = Folder(folder)
    place.create()
    app = application(place, hosts, token, 7860)
    return TestClient(app, base_url=BASE, headers=headers, raise_server_exceptions=False, follow_redirects=False)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "clips" / "a.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def client(picture, monkeypatch):
    """A client of a server whose workers wait."""
    stub_worker(picture.parent.parent, monkeypatch)
    with opened(picture.parent) as client:
        yield client


def wanted(**changes):
    return {"task": "r2v", "prompt": "a sea", "images": ["a.png"]} | changes


def job_of(client, **changes):
    answer = client.post("/api/jobs", json=wanted(**changes))
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def statuses(client):
    return [job["status"] for job in client.get("/api/jobs").json()]
