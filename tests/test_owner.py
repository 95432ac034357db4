"""One clip, one owner: what is there is kept, and two runs never make the same file."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import fail, followed, small_request, stopped

from skyrun import run
from skyrun.cli import main
from skyrun.engine.output import alone, check_outputs, is_made, state_path
from skyrun.engine.run import run_job
from skyrun.errors import BAD_INPUT, SkyrunError
from skyrun.events import StageEnded
from skyrun.planning.job import prepare

ROOT = Path(__file__).parent.parent


@pytest.fixture
def request_(converted, tmp_path):
    return small_request(tmp_path, converted("Q8_0"), frames=1, steps=1)


@pytest.fixture
def told(request_):
    """told("--seed", "4") are the arguments for its clip."""

    def arguments(*more):
        start = ["run", "r2v", "-p", "a sea", "--image", str(request_.images[0]), "--model", str(request_.model)]
        small = ["--size", "32x48", "--frames", "1", "--steps", "1", "--device", "cpu"]
        return [*start, *small, "-o", str(request_.output), *more]

    return arguments


def test_a_clip_of_the_same_request_is_kept(told, request_, capsys):
    assert main(told("--seed", "3")) == 0
    before = request_.output.stat().st_mtime_ns
    assert main(told("--seed", "3", "--max-ram", "4", "--json")) == 0  # what it is made with may be another
    out = capsys.readouterr()
    assert "it is there already" in out.err
    assert json.loads(out.out.splitlines()[-1])["output"] == str(request_.output)
    assert request_.output.stat().st_mtime_ns == before


OTHERS = [
    (["--seed", "4"], "seed"),
    (["--seed", "3", "-p", "a lake"], "prompt"),
    (["--seed", "3", "--exact"], "precision"),
    (["--seed", "3", "--dtype", "bfloat16"], "dtype"),
]


@pytest.fixture(scope="module")
def made(converted, tmp_path_factory):
    """A clip of seed 3."""
    folder = tmp_path_factory.mktemp("made")
    return run(small_request(folder, converted("Q8_0"), frames=1, steps=1)).output


@pytest.mark.parametrize(("options", "message"), OTHERS)
def test_any_other_file_is_kept_too(told, request_, made, capsys, options, message):
    request_.output.parent.mkdir()
    request_.output.write_bytes(made.read_bytes())
    assert main(told(*options)) == BAD_INPUT
    said = capsys.readouterr().err
    assert (
        f"{request_.output} exists, from a request that differs in " in said
        and message in said
        and "--overwrite" in said
    )
    assert request_.output.read_bytes() == made.read_bytes()


def test_a_file_of_something_else_is_kept(told, request_, tmp_path, capsys):
    request_.output.parent.mkdir()
    for option, path in (("-o", tmp_path / "a.mp4"), ("--save-latents", tmp_path / "b.txt")):
        path.write_text("mine")
        assert main(told("--seed", "3", option, str(path), "--dry-run")) == BAD_INPUT
        assert f"{path} exists, and is not a clip or latents of skyrun" in capsys.readouterr().err
        assert path.read_text() == "mine"
    sheet = request_.output.with_suffix(".png")
    sheet.write_text("mine")
    assert main(told("--seed", "3", "--sheet")) == BAD_INPUT
    assert f"{sheet} exists" in capsys.readouterr().err and sheet.read_text() == "mine"


def test_overwrite_replaces(told, request_, tmp_path):
    request_.output.parent.mkdir()
    request_.output.write_text("mine")
    latents = tmp_path / "latents.safetensors"
    latents.write_text("mine")
    assert main(told("--seed", "3", "--save-latents", str(latents), "--overwrite")) == 0
    job = prepare(dataclasses.replace(request_, save_latents=latents))
    assert is_made(job.request)
    before = request_.output.stat().st_mtime_ns
    assert main(told("--seed", "3", "--overwrite")) == 0  # makes it again
    assert request_.output.stat().st_mtime_ns != before


def test_latents_that_are_missing_make_the_clip_again(told, request_, tmp_path, capsys):
    assert main(told("--seed", "3")) == 0
    assert main(told("--seed", "3", "--save-latents", str(tmp_path / "x.safetensors"))) == 0
    assert "it is there already" not in capsys.readouterr().err
    assert (tmp_path / "x.safetensors").exists()


def test_a_sheet_that_is_missing_is_drawn(told, request_, capsys):
    assert main(told("--seed", "3")) == 0
    assert main(told("--seed", "3", "--sheet")) == 0
    assert "it is there already" in capsys.readouterr().err
    assert request_.output.with_suffix(".png").exists()


def test_a_run_of_the_same_request_from_python_makes_it_again(request_):
    before = run(request_).latents
    assert (run(request_).latents == before).all()
    with pytest.raises(SkyrunError, match="seed"):
        run(dataclasses.replace(request_, seed=4))


def test_resume_keeps_a_clip_that_is_there(request_, told, capsys):
    stopped(prepare(request_), "denoise", 1)
    request_.output.write_text("mine")
    assert main(["resume", str(request_.output)]) == BAD_INPUT
    assert request_.output.read_text() == "mine" and state_path(request_.output).exists()
    assert main(["resume", str(request_.output), "--overwrite"]) == 0
    assert not state_path(request_.output).exists()


def test_what_is_kept_of_a_run_that_overwrites_goes_on(request_, told, capsys, monkeypatch):
    request_.output.parent.mkdir()
    request_.output.write_text("mine")
    fail(monkeypatch, "skyrun.media.video_writer.VideoWriter.finish", OSError, (0,))
    assert main(told("--seed", "3", "--overwrite", "--json")) == 1
    out = capsys.readouterr()
    (kept,) = [event for line in out.out.splitlines() if (event := json.loads(line))["event"] == "kept"]
    assert kept["path"] == str(state_path(request_.output)) and kept["command"] in out.err
    assert main(kept["command"].split()[1:]) == 0


def test_two_runs_do_not_make_one_clip(request_, told, capsys):
    events = run_job(prepare(request_))
    next(events)
    assert main(told("--seed", "3")) == BAD_INPUT
    said = capsys.readouterr().err
    assert f"is being made by process {os.getpid()} on" in said and "-o" in said
    with pytest.raises(SkyrunError, match="is being made by"):
        next(run_job(prepare(request_)))
    followed(events)
    assert request_.output.exists()
    assert [path.name for path in request_.output.parent.iterdir()] == [request_.output.name]


def test_another_process_is_kept_out(request_, tmp_path):
    """The lock holds between processes, and that of a killed one holds nobody up."""
    code = "import sys, time; from pathlib import Path; from skyrun.engine.output import alone\n"
    code += "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(request_.output)], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(SkyrunError, match=f"is being made by process {holder.pid} on"):
        check_outputs(request_)
    holder.kill()
    holder.wait()
    check_outputs(request_)
    with alone(request_.output):
        pass
    assert not list(request_.output.parent.iterdir())


def test_a_state_of_a_clip_with_another_ending(request_):
    """c.MP4 stays c.MP4."""
    request = dataclasses.replace(request_, output=request_.output.with_suffix(".MP4"))
    stopped(prepare(request), "denoise", 1)
    assert main(["resume", str(state_path(request.output))]) == 0
    assert [path.name for path in request.output.parent.iterdir()] == ["clip.MP4"]


def test_a_second_interrupt_ends_at_once(request_):
    code = """
import signal, sys, threading, time
from skyrun.cli.signals import interruptible
with interruptible():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("saving", flush=True)
        time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    start = time.monotonic()
    for word in ("begun\n", "saving\n"):
        assert process.stdout.readline() == word
        process.send_signal(2)
    assert process.wait(20) == 130 and time.monotonic() - start < 20
    assert "ended at once" in process.stderr.read()


def test_events_do_not_hold_a_stage_twice(request_):
    _, events = followed(run_job(prepare(request_)))
    ended = [event.stage for event in events if isinstance(event, StageEnded)]
    assert len(ended) == len(set(ended))
