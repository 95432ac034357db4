"""Many clips on several devices, and Ctrl-C: a lost worker costs its clip only, and once is enough."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from small_run import small_request

from skyrun import run
from skyrun.cli import main
from skyrun.engine.resume import continue_or_start
from skyrun.engine.run import run_job
from skyrun.engine.side_by_side import SideBySide
from skyrun.engine.together import workers
from skyrun.errors import INTERRUPTED, SkyrunError
from skyrun.events import Progress
from skyrun.media.video_reader import frame_count
from skyrun.parallel.team import Stop

CPU = torch.device("cpu")


def workers_below(process):
    """The worker processes that a process has started."""
    children = [child for child in process.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in children if "skyrun.engine.worker" in child.cmdline()]


def test_a_lost_worker_costs_its_clip_only(converted, tmp_path):
    seeds = (1, 2, 3)
    requests = [
        small_request(tmp_path, converted("Q8_0"), seed=seed, devices=2, output=tmp_path / f"{seed}.mp4")
        for seed in seeds
    ]
    made, failed, lost = {}, {}, None
    with SideBySide(run_job, continue_or_start, requests, CPU) as devices:
        for told in devices.told():
            if lost is None and isinstance(told.what, Progress) and told.what.stage == "denoise":
                lost = told.clip, told.device
                worker = [w for w in workers_below(psutil.Process()) if w.environ()["LOCAL_RANK"] == str(told.device)]
                worker[0].kill()
            elif isinstance(told.what, SkyrunError):
                failed[told.clip] = told.what
            elif hasattr(told.what, "latents") and hasattr(told.what, "frames"):
                made[told.clip] = told.what
    assert list(failed) == [lost[0]]
    assert failed[lost[0]].message == f"the worker of device {lost[1]} was killed (signal 9)"
    assert set(made) == {0, 1, 2} - {lost[0]}
    for clip, result in made.items():
        expected = run(small_request(tmp_path, converted("Q8_0"), seed=seeds[clip], output=None))
        assert torch.equal(result.latents, expected.latents)
        assert frame_count(requests[clip].output) == 5
    assert not workers_below(psutil.Process())


def test_clips_go_to_devices_if_there_are_enough(converted, run_command, tmp_path, capsys):
    command = [*run_command, "--model", str(converted("Q8_0")), "--devices", "2", "--json", "--seed", "1", "2"]
    preview = tmp_path / "preview.png"
    assert main([*command, "--sheet", "--preview", str(preview)]) == 0
    assert preview.exists() and (tmp_path / "clip-1.png").exists() and (tmp_path / "clip-2.png").exists()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    results = [line for line in lines if line["event"] == "result"]
    assert {line["clip"] for line in results} == {1, 2} and {line["device"] for line in results} <= {0, 1}
    assert {line["plan"]["devices"] for line in lines if line["event"] == "plan"} == {1}
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["clip-1.mp4", "clip-2.mp4"]
    assert main([*command, "--seed", "1", "2"]) == 0
    assert capsys.readouterr().err.count("it is there already") == 2


class SavesWhenStopped:
    """Work for a worker that takes a moment to save what it has."""

    def __init__(self, path):
        self.path = path

    def __call__(self, group, tell):
        tell("started")
        try:
            for _ in range(600):
                time.sleep(0.1)
        finally:
            tell("saving")
            time.sleep(1)
            self.path.write_text("saved")


def test_a_second_stop_does_not_cut_off_what_the_first_one_saves(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
    team = workers(1, CPU)
    team.send(SavesWhenStopped(tmp_path / "state"))
    messages = team.messages()
    for said in ("started", "saving"):
        assert next(messages) == (0, said)
        team._channels[0].send(Stop())
    with pytest.raises(SkyrunError, match="interrupted") as caught:
        next(messages)
    assert caught.value.code == INTERRUPTED
    team.stop(at_once=False)
    assert (tmp_path / "state").read_text() == "saved"


@pytest.fixture
def denoising(converted, run_command):
    """denoising("1", "2") is a command that makes long clips of these seeds on two devices, and denoises already."""

    def start(*seeds):
        model = ["--model", str(converted("Q8_0")), "--devices", "2", "--json", "--steps", "900", "--seed", *seeds]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "skyrun", *run_command, *model]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=environment, **pipes)
        for line in process.stdout:
            if '"denoise"' in line and '"progress"' in line:
                break
        return process, workers_below(psutil.Process(process.pid))

    return start


@pytest.mark.skipif(sys.platform == "win32", reason="signals of a terminal")
@pytest.mark.parametrize("seeds", ["1", "12"])
def test_one_interrupt_is_enough(denoising, tmp_path, seeds):
    """For a clip on two devices, and for a clip on each."""
    run, started = denoising(*seeds)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert run.returncode == INTERRUPTED, said
    assert len(started) == 2
    assert not any(worker.is_running() for worker in started)
    assert "interrupted" in said and "Traceback" not in said
    assert list(tmp_path.glob("*.skyrun.safetensors"))
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_workers_end_with_the_process_that_has_started_them(denoising):
    run, started = denoising("1")
    run.kill()
    run.communicate(timeout=60)
    assert len(started) == 2
    assert psutil.wait_procs(started, timeout=60)[1] == []
