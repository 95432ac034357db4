"""Many clips on several devices, and Ctrl-C: a lost worker costs its clip only, and once is enough."""

import json
import os
import re
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from PIL import Image
from small_run import fail_in_workers, small_request

from skyrun import run
from skyrun.cli import main
from skyrun.engine.clip import Result
from skyrun.engine.resume import continue_or_start, resume
from skyrun.engine.side_by_side import SideBySide
from skyrun.errors import FAILED, INTERRUPTED, SkyrunError
from skyrun.events import Progress, Replanned
from skyrun.media.video_reader import frame_count

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
    with SideBySide(continue_or_start, dict(enumerate(requests)), {0: CPU, 1: CPU}, 2) as devices:
        for told in devices.told():
            if lost is None and isinstance(told.what, Progress) and told.what.stage == "denoise":
                lost = told.clip, told.device
                worker = [w for w in workers_below(psutil.Process()) if w.environ()["LOCAL_RANK"] == str(told.device)]
                worker[0].kill()
            elif isinstance(told.what, SkyrunError):
                failed[told.clip] = told.what
            elif isinstance(told.what, Result):
                made[told.clip] = told.what
    assert list(failed) == [lost[0]]
    assert failed[lost[0]].message == f"the worker of device {lost[1]} was killed (signal 9)"
    assert set(made) == {0, 1, 2} - {lost[0]}
    for clip, result in made.items():
        expected = run(small_request(tmp_path, converted("Q8_0"), seed=seeds[clip], output=None))
        assert torch.equal(result.latents, expected.latents)
        assert frame_count(requests[clip].output) == 5
    assert not workers_below(psutil.Process())


def test_a_worker_without_memory_gets_a_smaller_plan(converted, tmp_path, monkeypatch):
    requests = [
        small_request(tmp_path, converted("Q8_0"), seed=seed, devices=2, output=tmp_path / f"{seed}.mp4")
        for seed in (1, 2)
    ]
    fail_in_workers(monkeypatch, tmp_path / "workers", [(1, "skyrun.models.dit.transformer.dit_block", (5,))])
    with SideBySide(continue_or_start, dict(enumerate(requests)), {0: CPU, 1: CPU}, 2) as devices:
        told = list(devices.told())
    assert [(one.device, one.what.text.partition(";")[0]) for one in told if isinstance(one.what, Replanned)] == [
        (1, "denoise is out of memory: made to fail")
    ]
    made = {one.clip: one.what for one in told if isinstance(one.what, Result)}
    assert set(made) == {0, 1}
    for clip, result in made.items():
        expected = run(small_request(tmp_path, converted("Q8_0"), seed=clip + 1, output=None))
        assert torch.equal(result.latents, expected.latents)
    assert not workers_below(psutil.Process())


def test_clips_go_to_devices_if_there_are_enough(converted, run_command, tmp_path, capsys, monkeypatch):
    """The contact sheet of the first one cannot be written at first."""
    command = [
        *run_command,
        "--model",
        str(converted("Q8_0")),
        "--devices",
        "2",
        "--json",
        "--sheet",
        "--seed",
        "1",
        "2",
    ]
    save, preview = Image.Image.save, tmp_path / "preview.png"

    def without_space(image, path, **keywords):
        if "clip-1.png" in str(path):
            raise OSError(28, "No space left on device")
        save(image, path, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", without_space)
        assert main([*command, "--preview", str(preview)]) == FAILED
    out, said = capsys.readouterr()
    assert said.count("No space left on device") == 1 and "1 of 2 clips failed: " in said
    assert preview.exists() and (tmp_path / "clip-2.png").exists() and not (tmp_path / "clip-1.png").exists()
    lines = [json.loads(line) for line in out.splitlines()]
    results = [line for line in lines if line["event"] == "result"]
    assert {line["clip"] for line in results} == {1, 2} and {line["device"] for line in results} <= {0, 1}
    assert {line["plan"]["devices"] for line in lines if line["event"] == "plan"} == {1}
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["clip-1.mp4", "clip-2.mp4"]
    assert main(command) == 0
    assert capsys.readouterr().err.count("it is there already") == 2
    assert (tmp_path / "clip-1.png").exists()


@pytest.fixture
def launched(converted, run_command):
    """launched("--seed", "1") is how such a command ends in two processes of torchrun, and what it prints."""

    def run(*arguments):
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "skyrun",
        ]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | os.environ
        command = [*launch, *run_command, "--model", str(converted("Q8_0")), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_process_of_torchrun_without_memory_says_what_to_type(launched, tmp_path, monkeypatch):
    fail_in_workers(monkeypatch, tmp_path / "workers", [(1, "skyrun.models.dit.transformer.dit_block", (3,))])
    code, _, said = launched("--seed", "1")
    assert code == 1, said
    assert "error: denoise is out of memory on device 1: made to fail" in said
    assert re.search(
        r"hint: `torchrun ... -m skyrun resume CLIP --max-ram 0\.[0-9]+` goes on from the last finished step", said
    )
    clip = tmp_path / "clip.mp4"
    assert resume(clip)[1].steps == 1
    assert main(["resume", str(clip), "--devices", "1"]) == 0


def test_processes_of_torchrun_leave_bad_input_to_the_first(launched):
    code, _, said = launched("--seed", "1", "--image", "none.png")
    assert code == 1  # that of the launcher
    assert len(re.findall("^error: ", said, re.M)) == 1 and "none.png" in said, said
    assert "exitcode  : 2" in said


def test_processes_of_torchrun_make_clips_of_their_own(launched, converted, run_command, tmp_path, monkeypatch):
    """The first worker of the second process is lost: that costs its clip, and no process ends before the others."""
    lost = [(1, "skyrun.models.dit.transformer.dit_block", (3,))]
    fail_in_workers(monkeypatch, tmp_path / "workers", lost, error="os.kill(os.getpid(), 9)")
    code, _, said = launched("--seed", "1", "2", "3", "4")
    made = re.findall(r"clip (\d) of 4, device (\d): \S+clip-(\d).mp4 in", said)
    assert sorted(made) == [("1", "0", "1"), ("3", "0", "3"), ("4", "1", "4")]
    assert "error: the worker of device 1 was killed (signal 9)" in said
    assert said.count("1 of 4 clips failed: ") == said.count(f"{tmp_path / 'clip-2.mp4'}; the same command") == 1
    assert code == 1
    assert "interrupted" not in said
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["clip-1.mp4", "clip-3.mp4", "clip-4.mp4"]
    assert main([*run_command, "--model", str(converted("Q8_0")), "--seed", "1", "2", "3", "4"]) == 0
    assert sorted(path.name for path in tmp_path.glob("clip*")) == [f"clip-{number}.mp4" for number in (1, 2, 3, 4)]


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
    assert ("the same command goes on" if len(seeds) > 1 else "go on with: skyrun resume") in said
    assert list(tmp_path.glob("*.skyrun.safetensors"))
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_workers_end_with_the_process_that_has_started_them(denoising):
    run, started = denoising("1")
    run.kill()
    run.communicate(timeout=60)
    assert len(started) == 2
    assert psutil.wait_procs(started, timeout=60)[1] == []
