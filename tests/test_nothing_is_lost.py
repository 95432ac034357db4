"""Runs that end early, at every stage and for every reason, and go on: to the frames of an undisturbed run."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from skyrun import job as job_module
from skyrun import keeper, runner
from skyrun.cli import main
from skyrun.errors import WILL_NOT_FIT, SkyrunError
from skyrun.events import FramesReady, Notice, Progress, StageEnded, StageStarted, drain
from skyrun.job import prepare, shrunk
from skyrun.presets import Hardware
from skyrun.presets.memory import GIB
from skyrun.request import Request
from skyrun.resume import continue_or_start, resume
from skyrun.run_state import load_state, state_path
from skyrun.runner import run_job

STEPS = 4


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def request_(picture, converted, tmp_path):
    how = {"size": (32, 48), "frames": 5, "steps": STEPS, "seed": 3, "device": "cpu"}
    return Request("r2v", "a sea", (picture,), output=tmp_path / "clip.mp4", model=converted("Q8_0"), **how)


@pytest.fixture(scope="module")
def undisturbed(picture, converted):
    how = {"size": (32, 48), "frames": 5, "steps": STEPS, "seed": 3, "device": "cpu"}
    return drain(run_job(prepare(Request("r2v", "a sea", (picture,), model=converted("Q8_0"), **how))))


@pytest.fixture(autouse=True)
def saved_often(monkeypatch):
    monkeypatch.setattr(keeper, "_SECONDS", 0.0)


def same(result, undisturbed):
    assert torch.equal(result.latents, undisturbed.latents)
    assert np.array_equal(result.frames, undisturbed.frames)


def is_at(stage, done):
    """Whether an event is the one after which so many units of a stage are done; done = 0: it begins."""
    if done == 0:
        return lambda event: isinstance(event, StageStarted) and event.stage == stage
    return lambda event: isinstance(event, Progress) and (event.stage, event.done) == (stage, done)


MOMENTS = [("text", 0), ("images", 0), ("load", 0), ("denoise", 0), ("denoise", 1), ("denoise", STEPS - 1)]
MOMENTS += [("decode", 0), ("decode", 1), ("write", 0)]


@pytest.mark.parametrize(("stage", "done"), MOMENTS)
def test_a_run_that_is_stopped_goes_on(request_, undisturbed, stage, done):
    events = run_job(prepare(request_))
    for event in events:
        if is_at(stage, done)(event):
            break
    events.close()
    path = state_path(request_.output)
    assert not request_.output.exists()
    assert {file.name for file in request_.output.parent.iterdir()} <= {path.name}
    if (stage, done) == ("text", 0):
        assert not path.exists()
        return
    job, state = resume(request_.output)
    assert state.steps == (done if stage == "denoise" else STEPS if stage in ("decode", "write") else 0)
    same(drain(run_job(job, state=state)), undisturbed)
    assert request_.output.exists() and not path.exists()


@pytest.mark.parametrize("done", [1, 3])
def test_a_run_that_is_killed_goes_on(request_, undisturbed, done):
    """Nothing is saved on the way out: what the last save left has to do."""
    events = run_job(prepare(request_))
    for event in events:
        if is_at("denoise", done)(event):
            break
    content = state_path(request_.output).read_bytes()
    events.close()
    state_path(request_.output).write_bytes(content)
    job, state = resume(state_path(request_.output))
    assert state.steps == done
    same(drain(run_job(job, state=state)), undisturbed)


def failing(monkeypatch, module, name, error, calls):
    """Let a function fail at these calls of it."""
    right, count = getattr(module, name), iter(range(1000))

    def fails(*arguments, **how):
        if next(count) in calls:
            raise error
        return right(*arguments, **how)

    monkeypatch.setattr(module, name, fails)


def smaller_plans(monkeypatch, rows):
    """What plans there are after the first; the tiny model needs hardly more memory than the interpreter."""
    left = list(rows)

    def shrunk(job):
        return dataclasses.replace(job, plan=dataclasses.replace(job.plan, token_rows=left.pop(0))) if left else None

    monkeypatch.setattr(runner, "shrunk", shrunk)


def stages_and_notices(events):
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as stop:
            ended = [event.stage for event in seen if isinstance(event, StageEnded)]
            return stop.value, ended, [event.text for event in seen if isinstance(event, Notice)]


OOM = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
# Calls are counted from the checks before the run on, which go through blocks and autoencoder on shapes alone.
PLACES = [
    ("skyrun.models.umt5", "umt5_block", (3,)),
    ("skyrun.models.vae.WanVAE", "sample", (0,)),
    ("skyrun.models.dit.DiT", "__init__", (0,)),
    ("skyrun.models.dit", "dit_block", (0,)),
    ("skyrun.models.dit", "dit_block", (5,)),
    ("skyrun.models.vae.WanVAE", "_decoder", (3,)),
    ("skyrun.models.vae.WanVAE", "_decoder", (4,)),
]


def found(name):
    from importlib import import_module

    module, _, last = name.rpartition(".")
    return getattr(import_module(module), last) if last[0].isupper() else import_module(name)


@pytest.mark.parametrize(("place", "name", "calls"), PLACES)
def test_out_of_memory_at_every_stage(request_, monkeypatch, place, name, calls):
    error = OOM[sum(calls) % 2]
    request_ = dataclasses.replace(request_, prompt=f"a sea {name} {calls} {type(error)}")  # not in any cache
    smaller_plans(monkeypatch, [7])
    failing(monkeypatch, found(place), name, error, calls)
    result, ended, notices = stages_and_notices(run_job(prepare(request_)))
    assert len(notices) == 1
    assert "out of memory" in notices[0] and "7 tokens at a time" in notices[0]
    assert sorted(set(ended)) == sorted(["text", "images", "load", "denoise", "decode", "write"])
    assert ended.count("text") == ended.count("images") == 1
    monkeypatch.undo()
    expected = drain(run_job(prepare(dataclasses.replace(request_, output=None))))
    torch.testing.assert_close(result.latents, expected.latents, rtol=1e-4, atol=1e-4)
    assert np.abs(result.frames.astype(int) - expected.frames).max() <= 1
    assert result.frames.shape == expected.frames.shape


def test_out_of_memory_twice_and_then_for_good(request_, monkeypatch):
    smaller_plans(monkeypatch, [18, 7])
    failing(monkeypatch, found("skyrun.models.dit"), "dit_block", MemoryError(), (3, 5))
    result, _, notices = stages_and_notices(run_job(prepare(request_)))
    assert len(notices) == 2 and result.output.exists()
    monkeypatch.undo()
    smaller_plans(monkeypatch, [18])
    failing(monkeypatch, found("skyrun.models.dit"), "dit_block", MemoryError(), range(3, 1000))
    with pytest.raises(SkyrunError, match="out of memory") as caught:
        drain(run_job(prepare(dataclasses.replace(request_, output=request_.output.with_name("b.mp4")))))
    assert caught.value.code == WILL_NOT_FIT
    assert state_path(request_.output.with_name("b.mp4")).exists()


def test_plans_shrink_until_there_is_none(request_, monkeypatch):
    job = prepare(request_)
    hardware = Hardware("cuda", "a card", 12 * GIB, 12 * GIB, 32 * GIB, 32 * GIB)
    monkeypatch.setattr(job_module, "probe", lambda device: hardware)
    work = dataclasses.replace(
        job.workload, dim=5120, ffn_dim=13824, layers=40, block_bytes=373_000_000, latent_frames=35, height=720,
        width=1280, vae_base_dim=96, vae_weights=127_000_000, outer_bytes=400_000_000
    )  # fmt: skip
    job = dataclasses.replace(job, workload=work, device=torch.device("cuda"))
    job = dataclasses.replace(job, plan=job_module._plan(job.request, work, job.device))
    peaks = []
    while job is not None:
        peaks.append(job.plan.peak_bytes)
        job = shrunk(job)
    assert 3 < len(peaks) < 20
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    assert peaks[-1] < 7 * GIB


def test_a_state_that_cannot_be_saved_does_not_stop_the_run(request_, undisturbed, monkeypatch):
    monkeypatch.setattr(keeper, "save_state", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    result, _, notices = stages_and_notices(run_job(prepare(request_)))
    assert len(notices) == 1 and "No space left" in notices[0]
    same(result, undisturbed)


def test_a_clip_that_cannot_be_written_can_be_written_later(request_, undisturbed, monkeypatch):
    failing(monkeypatch, found("skyrun.video.VideoWriter"), "add", OSError(28, "No space left on device"), (1,))
    with pytest.raises(SkyrunError, match="No space left"):
        drain(run_job(prepare(request_)))
    assert not request_.output.exists()
    job, state = resume(request_.output)
    result, ended, _ = stages_and_notices(run_job(job, state=state))
    assert ended == ["decode", "write"]
    same(result, undisturbed)


def started(request_, steps):
    events = run_job(prepare(request_))
    for event in events:
        if is_at("denoise", steps)(event):
            break
    events.close()


def test_the_same_run_again_goes_on_by_itself(request_, undisturbed):
    started(request_, 2)
    job, state = continue_or_start(dataclasses.replace(request_, seed=None, max_ram=20.0))
    assert state.steps == 2 and job.request.seed == 3
    same(drain(run_job(job, state=state)), undisturbed)
    assert continue_or_start(dataclasses.replace(request_, seed=5))[1] is None


@pytest.mark.parametrize("changes", [{"prompt": "a city"}, {"seed": 4}, {"steps": 5}, {"dtype": "bfloat16"}])
def test_another_run_does_not_take_its_place(request_, changes):
    started(request_, 1)
    content = state_path(request_.output).read_bytes()
    with pytest.raises(SkyrunError, match="holds another run that is not finished: 'a sea', seed 3"):
        continue_or_start(dataclasses.replace(request_, **changes))
    assert state_path(request_.output).read_bytes() == content


def test_another_model_does_not_go_on_with_it(request_, converted):
    started(request_, 1)
    path = state_path(request_.output)
    content = path.read_bytes()
    ours, other = (str(converted(quant)).encode() for quant in ("Q8_0", "Q4_K"))
    assert len(ours) == len(other) and ours in content
    path.write_bytes(content.replace(ours, other))
    with pytest.raises(SkyrunError, match="is not the one that .* was made with"):
        resume(request_.output)


def damages(content):
    header = 8 + int.from_bytes(content[:8], "little")
    yield content[: len(content) // 2]
    yield b""
    yield content[:8] + content[8:header].replace(b"version", b"verschn") + content[header:]
    yield content[:8] + content[8:header].replace(b'\\"version\\": 1', b'\\"version\\": 9') + content[header:]
    yield (
        content[:8] + content[8:header].replace(b"a2v", b"a2v").replace(b'\\"task\\"', b'\\"tusk\\"') + content[header:]
    )


def test_damaged_states_are_refused(request_):
    started(request_, 1)
    path = state_path(request_.output)
    load_state(path)
    for content in damages(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(SkyrunError, match=r"clip.skyrun.safetensors|these values are not a request"):
            resume(path)
    with pytest.raises(SkyrunError, match="there is no unfinished run"):
        resume(path.with_name("other.mp4"))


def arguments_of(request_):
    arguments = ["run", "r2v", "-p", request_.prompt, "--image", str(request_.images[0]), "-o", str(request_.output)]
    arguments += ["--model", str(request_.model), "--size", "32x48", "--frames", "5", "--steps", str(STEPS)]
    return [*arguments, "--seed", "3", "--device", "cpu", "--json"]


def test_by_command_line(request_, undisturbed, monkeypatch, capsys):
    """Ctrl-C says what goes on, and that does."""
    show = runner.Keeper.after

    def interrupted(self, event):
        if is_at("denoise", 3)(event):
            signal.raise_signal(signal.SIGINT)
        return show(self, event)

    monkeypatch.setattr(runner.Keeper, "after", interrupted)
    assert main(arguments_of(request_)) == 130
    said = capsys.readouterr().err
    kept = state_path(request_.output)
    assert f"go on with: skyrun resume {kept}" in said
    monkeypatch.setattr(runner.Keeper, "after", show)
    assert main(["resume", str(kept), "--device", "cpu", "--json"]) == 0
    out = capsys.readouterr()
    assert "3 of 4 steps were finished before" in out.err
    events = [json.loads(line) for line in out.out.splitlines()]
    assert [e["before"] for e in events if e["event"] == "StageStarted" and e["stage"] == "denoise"] == [3]
    assert [e["stage"] for e in events if e["event"] == "StageEnded"] == ["load", "denoise", "decode", "write"]
    assert request_.output.exists() and not kept.exists()
    assert main(["resume", str(kept)]) == 2
    assert "no unfinished run" in capsys.readouterr().err


def test_a_run_without_a_clip_keeps_nothing_on_disk(request_, tmp_path):
    frames = [event for event in run_job(prepare(dataclasses.replace(request_, output=None)), keep_frames=False)
              if isinstance(event, FramesReady)]  # fmt: skip
    assert frames and list(tmp_path.iterdir()) == []
