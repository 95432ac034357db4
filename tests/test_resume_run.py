"""The state of a run on disk: what goes on from it, what is refused, and what the command line says."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_run import STEPS, fail, small_request, stopped

from skyrun import run
from skyrun.cli import main
from skyrun.engine import checkpoint as keeper
from skyrun.engine import checkpoint as run_state
from skyrun.engine.checkpoint import load_state
from skyrun.engine.output import clip_path, state_path
from skyrun.engine.resume import continue_or_start, resume
from skyrun.engine.run import run_job
from skyrun.errors import BAD_INPUT, FAILED, INTERRUPTED, SkyrunError
from skyrun.events import drain
from skyrun.media.video_writer import VideoWriter
from skyrun.planning.job import prepare
from skyrun.presets import probe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def undisturbed(converted, tmp_path_factory):
    return run(small_request(tmp_path_factory.mktemp("undisturbed"), converted("Q8_0")))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A state after every step."""
    monkeypatch.setattr(keeper, "_SHARE", float("inf"))


@pytest.fixture(scope="module")
def content(converted, tmp_path_factory):
    """A state after two steps."""
    folder = tmp_path_factory.mktemp("begun")
    job = prepare(small_request(folder, converted("Q8_0")))
    stopped(job, "denoise", 2)
    return job.request, state_path(job.request.output).read_bytes()


@pytest.fixture
def begun(content, tmp_path):
    """A run that was stopped after two steps, in a folder of its own: its request, and its state."""
    request, state = content
    request = dataclasses.replace(request, output=tmp_path / "clip.mp4")
    path = state_path(request.output)
    path.write_bytes(state)
    return request, path


def same(result, undisturbed):
    assert torch.equal(result.latents, undisturbed.latents)
    assert np.array_equal(result.frames, undisturbed.frames)


def test_names():
    assert state_path(Path("a/clip.mp4")) == Path("a/clip.skyrun.safetensors")
    assert state_path(Path("a/clip.skyrun.safetensors")) == Path("a/clip.skyrun.safetensors")
    assert clip_path(Path("a/my.clip.skyrun.safetensors")) == Path("a/my.clip.mp4")


@pytest.mark.parametrize("named", ["clip", "state"])
def test_it_goes_on_by_the_name_of_clip_or_state(begun, undisturbed, named):
    request, path = begun
    job, state = resume(request.output if named == "clip" else path)
    assert state.steps == 2
    assert job.request == request
    same(drain(run_job(job, state=state)), undisturbed)
    assert request.output.exists() and not path.exists()


def test_the_clip_is_the_same_file_as_without_a_disturbance(begun, undisturbed):
    request, path = begun
    clips = [request.output, request.output.with_name("whole.mp4")]
    drain(run_job(*[resume(path)[0]], state=resume(path)[1]))
    run(dataclasses.replace(request, output=clips[1]))
    one, other = (clip.read_bytes() for clip in clips)
    assert len(one) - len(str(clips[0])) == len(other) - len(str(clips[1]))
    assert one.split(b"mdat")[1][: len(one) // 2] == other.split(b"mdat")[1][: len(one) // 2]


def test_a_state_that_was_moved_makes_its_clip_where_it_is(begun, undisturbed, tmp_path):
    _, path = begun
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(path, tmp_path / "elsewhere" / "other.skyrun.safetensors"))
    job, state = resume(moved)
    same(drain(run_job(job, state=state)), undisturbed)
    assert [file.name for file in moved.parent.iterdir()] == ["other.mp4"]


def test_it_goes_on_from_another_folder(begun, tmp_path, monkeypatch):
    request, path = begun
    monkeypatch.chdir(request.images[0].parent)
    relative = dataclasses.replace(request, images=("picture.png",))
    assert continue_or_start(relative)[1].steps == 2
    path.unlink()
    stopped(prepare(relative), "denoise", 1)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert resume(Path("../clip.mp4"))[1].steps == 1


def test_limits_may_be_others(begun):
    job, _ = resume(begun[1], max_ram=3.0, device=None)
    assert job.request.max_ram == 3.0
    assert job.plan.limit_bytes == 3 << 30
    with pytest.raises(SkyrunError, match="will not fit"):
        resume(begun[1], max_ram=0.1)
    assert begun[1].exists()


def test_numbers_keep_their_types(begun, monkeypatch):
    """Whatever would be chosen by now: a measurement may come out differently, steps may not."""
    request, path = begun
    path.unlink()
    stopped(prepare(dataclasses.replace(request, precision="fast", dtype="bfloat16")), "denoise", 1)
    state, origin = load_state(path)
    undecided = dataclasses.replace(origin.request, precision=None, dtype=None)
    run_state.save_state(path, state, dataclasses.replace(origin, request=undecided))
    job, _ = resume(path)
    assert (job.plan.precision, job.plan.dtype) == ("fast", "bfloat16")
    assert job.request == undecided


def test_the_same_run_again_goes_on(begun, undisturbed):
    request, path = begun
    job, state = continue_or_start(dataclasses.replace(request, seed=None, max_ram=20.0))
    assert state.steps == 2 and job.request.seed == 3
    same(run(dataclasses.replace(request, seed=None)), undisturbed)
    assert not path.exists()
    assert continue_or_start(request)[1] is None


OTHERS = [{"prompt": "a city"}, {"seed": 4}, {"steps": 5}, {"dtype": "bfloat16"}, {"frames": 9}, {"size": (48, 32)}]


@pytest.mark.parametrize("changes", OTHERS, ids=lambda changes: next(iter(changes)))
def test_another_run_does_not_take_its_place(begun, changes):
    request, path = begun
    before = path.read_bytes()
    (name,) = changes
    with pytest.raises(SkyrunError, match=f"holds 2 of 4 steps .* another {name}: 'a sea', seed 3") as caught:
        run(dataclasses.replace(request, **changes))
    assert f"skyrun resume {path}" in caught.value.hint
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_run_that_had_finished_no_step_gives_way(begun):
    request, path = begun
    path.unlink()
    stopped(prepare(request), "images", 0)
    assert continue_or_start(request)[1].steps == 0
    job, state = continue_or_start(dataclasses.replace(request, prompt="a city", seed=None))
    assert state is None and job.request.prompt == "a city"


@pytest.mark.parametrize("file", ["SkyReels*.gguf", "umt5*.gguf", "*.safetensors"])
def test_a_model_that_changed_is_refused(begun, converted, tmp_path, file):
    request, path = begun
    path.unlink()
    model = tmp_path / "model"
    shutil.copytree(converted("Q8_0"), model)
    request = dataclasses.replace(request, model=model)
    stopped(prepare(request), "denoise", 1)
    resume(path)
    (changed,) = model.glob(file)
    data = bytearray(changed.read_bytes())
    data[-100] ^= 1
    changed.write_bytes(data)
    for attempt in (lambda: resume(path), lambda: continue_or_start(request)):
        with pytest.raises(SkyrunError, match=f"the model is not the one .*{changed.name} changed since"):
            attempt()
    assert path.exists()


def rewritten(path, change):
    """Write a state again, its metadata and tensors changed, with a good checksum."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    run = json.loads(metadata["run"])
    change(run, tensors, metadata)
    metadata["run"] = json.dumps(run)
    metadata["crc32"] = run_state._checksum(metadata["run"], tensors)
    save_file(tensors, path, metadata)


def flipped(at):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return damage


# fmt: off
DAMAGES = {
    "empty": (lambda p: p.write_bytes(b""), "is damaged"),
    "half": (lambda p: p.write_bytes(p.read_bytes()[:5000]), "is damaged"),
    "a bit of the tensors": (flipped(-50), "checksum"),
    "a bit of the prompt": (lambda p: p.write_bytes(p.read_bytes().replace(b"a sea", b"a see")), "checksum"),
    "no metadata": (lambda p: save_file({"x": torch.zeros(1)}, p), "is not the state of a run"),
    "a newer version": (lambda p: rewritten(p, lambda run, t, m: m.update(version="9")), "version 9, this"),
    "no request": (lambda p: rewritten(p, lambda run, t, m: run.pop("request")), "is damaged"),
    "more steps": (lambda p: rewritten(p, lambda run, t, m: run["sampler"].update(index=9)), "after 9 steps"),
    "no history": (lambda p: rewritten(p, lambda run, t, m: t.pop("sampler.start")), "after 2 steps"),
    "no latents": (lambda p: rewritten(p, lambda run, t, m: t.pop("latents")), "are not those of a clip"),
    "other latents": (lambda p: rewritten(p, lambda run, t, m: t.update(latents=torch.zeros(16, 1, 4, 6))), "are not"),
    "other steps": (lambda p: rewritten(p, lambda run, t, m: run["request"].update(steps=9)), "its request 9"),
    "a huge shift": (lambda p: rewritten(p, lambda run, t, m: run["sampler"].update(shift=10**400)), "is damaged"),
    "a window without end": (lambda p: rewritten(p, lambda run, t, m: run.update(window=float("inf"))), "is damaged"),
    "no size": (lambda p: rewritten(p, lambda run, t, m: run["request"].pop("size")), "its request has no size"),
    "a list of models": (lambda p: rewritten(p, lambda run, t, m: run.update(model=["a"])), "not described in words"),
    "a number": (lambda p: rewritten(p, lambda run, t, m: run.update(sampler=3)), "is damaged"),
}
# fmt: on


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_state_is_refused(begun, what):
    request, path = begun
    damage, message = DAMAGES[what]
    damage(path)
    before = path.read_bytes()
    for attempt in (lambda: resume(path), lambda: continue_or_start(request)):
        with pytest.raises(SkyrunError, match=f"(?s){path.name}.*{message}") as caught:
            attempt()
        assert caught.value.code == BAD_INPUT and "skyrun run" in caught.value.hint
    assert path.read_bytes() == before


def test_a_model_of_other_parts_is_another_model(begun):
    request, path = begun
    rewritten(path, lambda run, t, m: run.update(model="a"))
    for attempt in (lambda: resume(path), lambda: continue_or_start(request)):
        with pytest.raises(SkyrunError, match="the model is not the one that .* was made with: transformer .* changed"):
            attempt()


def test_without_a_state_there_is_nothing_to_go_on_with(tmp_path, capsys):
    assert main(["resume", str(tmp_path / "clip.mp4")]) == BAD_INPUT
    assert "there is no unfinished run in" in capsys.readouterr().err
    (tmp_path / "clip.mp4").touch()
    assert main(["resume", str(tmp_path / "clip.mp4")]) == BAD_INPUT
    assert "clip.mp4 is finished" in capsys.readouterr().err


def arguments_of(request, *more):
    arguments = ["run", "r2v", "-p", request.prompt, "--image", str(request.images[0]), "-o", str(request.output)]
    arguments += ["--model", str(request.model), "--size", "32x48", "--frames", "5", "--steps", str(request.steps)]
    return [*arguments, "--seed", "3", "--device", "cpu", "--json", *more]


PLACES = {
    "text": "skyrun.models.umt5.umt5_block",
    "images": "skyrun.models.vae.WanVAE.sample",
    "load": "skyrun.pipelines.stages.DiT",
    "denoise": "skyrun.models.dit.transformer.dit_block",
    "decode": "skyrun.models.vae.WanVAE._decoder",
    "write": "skyrun.media.video_writer.VideoWriter.finish",
}


@pytest.mark.parametrize("stage", PLACES)
def test_asked_to_stop_it_keeps_what_is_finished(begun, monkeypatch, capsys, stage):
    request, path = begun
    path.unlink()
    request = dataclasses.replace(request, prompt=f"{stage}!")  # not in the cache of prompts
    asks = signal.SIGTERM if stage in ("images", "denoise", "write") else signal.SIGINT
    with monkeypatch.context() as patch:
        fail(patch, PLACES[stage], lambda: signal.raise_signal(asks), (5,) if stage == "denoise" else (0,))
        assert main(arguments_of(request)) == INTERRUPTED
    out, said = capsys.readouterr()
    assert [json.loads(line)["event"] for line in out.splitlines()[-2:]] == ["kept", "error"]
    assert f"go on with: skyrun resume {path}" in said
    assert "Traceback" not in said
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    steps = {"text": 0, "images": 0, "load": 0, "denoise": 2}
    assert load_state(path)[0].steps == steps.get(stage, STEPS)
    assert main(["resume", str(path), "--device", "cpu"]) == 0
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]


def test_the_command_line_goes_on(begun, capsys):
    request, path = begun
    assert main(["resume", str(request.output), "--max-ram", "3", "--json"]) == 0
    out = capsys.readouterr()
    assert "2 of 4 steps were finished before" in out.err
    events = [json.loads(line) for line in out.out.splitlines()]
    assert [e["before"] for e in events if e["event"] == "stage_started" and e["stage"] == "denoise"] == [2]
    assert [e["stage"] for e in events if e["event"] == "stage_ended"] == ["load", "denoise", "decode", "write"]
    assert events[-1]["event"] == "result" and events[-1]["output"] == str(request.output)


def test_pictures_are_drawn_by_a_run_that_goes_on(begun, tmp_path, capsys):
    request, path = begun
    picture = tmp_path / "now.png"
    assert main(["resume", str(path), "--sheet", "--preview", str(picture), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["path"] for event in events if event["event"] == "preview"] == [str(picture)] * 2
    assert picture.exists() and request.output.with_suffix(".png").exists()


def test_a_dry_run_touches_nothing(begun, capsys):
    request, path = begun
    before = path.read_bytes()
    assert main(arguments_of(request, "--dry-run")) == 0
    assert "2 of 4 steps were finished before" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_name_that_an_unfinished_clip_has_is_not_free(begun, monkeypatch, tmp_path):
    request, path = begun
    monkeypatch.chdir(tmp_path)
    path.rename(tmp_path / "r2v-3.skyrun.safetensors")
    arguments = arguments_of(request)
    at = arguments.index("-o")
    assert main(arguments[:at] + arguments[at + 2 :]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r2v-3-1.mp4", "r2v-3.skyrun.safetensors"]


def test_why_the_last_save_failed_is_said(begun, monkeypatch, capsys):
    request, path = begun
    path.unlink()
    fail(monkeypatch, "skyrun.engine.checkpoint.save_state", lambda: OSError(28, "No space left on device"), range(100))
    fail(monkeypatch, "skyrun.models.dit.transformer.dit_block", lambda: signal.raise_signal(signal.SIGINT), (5,))
    assert main(arguments_of(request)) == INTERRUPTED
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 2  # when it failed first, and at the end
    assert "go on with" not in said


def process(request, *more, **environment):
    """Run in a process of its own, with many steps so that there is time to end it."""
    command = [sys.executable, "-m", "skyrun", *arguments_of(request, *more)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment
    )


def wait_for(running, condition):
    for line in running.stdout:
        if condition(json.loads(line)):
            return
    raise AssertionError(running.stderr.read())


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_a_process_that_is_ended(begun, how):
    request, path = begun
    path.unlink()
    request = dataclasses.replace(request, steps=500)
    running = process(request)
    wait_for(running, lambda event: event["event"] == "progress" and path.exists() and load_state(path)[0].steps > 0)
    running.send_signal(getattr(signal, how))
    asked = time.monotonic()
    _, said = running.communicate(timeout=60)
    assert running.returncode == (INTERRUPTED if how == "SIGTERM" else -9)
    if how == "SIGTERM":
        assert "go on with: skyrun resume" in said and "Traceback" not in said
        assert time.monotonic() - asked < 30  # far more than it takes; a machine may be busy
    state, origin = load_state(path)
    assert origin.request.steps == 500
    assert 0 < state.steps < 500
    assert resume(path)[1].steps == state.steps


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_gets_full_while_the_clip_is_written(begun, monkeypatch, capsys):
    """A limit on the size of files stands in for the full disk: it begins with the first frames."""
    import resource

    request, path = begun
    request.output.write_text("the old clip")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    right = VideoWriter.add

    def add(self, frames):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
        right(self, frames)

    monkeypatch.setattr(VideoWriter, "add", add)
    try:
        assert main(["resume", str(path)]) == BAD_INPUT  # a clip that another request made is there
        assert main(["resume", str(path), "--overwrite"]) == FAILED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert "error: cannot write" in said and "go on with: skyrun resume" in said
    assert request.output.read_text() == "the old clip"
    assert sorted(file.name for file in path.parent.iterdir()) == ["clip.mp4", path.name]
    monkeypatch.setattr(VideoWriter, "add", right)
    assert main(["resume", str(path), "--overwrite"]) == 0
    assert request.output.stat().st_size > 2_000 and not path.exists()


@pytest.mark.parametrize(("slow", "chosen"), [(False, "Q8_0"), (True, "Q4_K")])
def test_of_several_files_the_plan_chooses(converted, tmp_path, monkeypatch, slow, chosen):
    """The best whose reading is hidden; a run that goes on keeps to it whatever would be chosen by then."""
    folder = tmp_path / "model"
    folder.mkdir()
    for quant in ("Q8_0", "Q4_K"):
        for path in converted(quant).iterdir():
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)

    def machine(device, model=None):
        return probe("cpu").knowing("stated", disk_rate=1e5 if slow else 1e9, ram_free=(1 if slow else 20) << 30)

    monkeypatch.setattr("skyrun.planning.job.this_machine", machine)
    monkeypatch.setattr("skyrun.presets.timing.CACHED_SHARE", 0.0)
    job = prepare(small_request(tmp_path, folder))
    assert chosen in job.files.transformer.path.name
    assert (job.request.quant, job.plan.weight_type, job.workload.weight_type) == (chosen, chosen, chosen)
    stopped(job, "denoise", 1)
    slow = not slow
    again, state = resume(job.request.output)
    assert state.steps == 1 and again.files.transformer.path == job.files.transformer.path
    named = prepare(small_request(tmp_path, folder, quant="Q4_K"))
    assert "Q4_K" in named.files.transformer.path.name


def test_a_clip_in_capitals_keeps_its_name(begun, tmp_path):
    request, _ = begun
    request = dataclasses.replace(request, output=tmp_path / "C.MP4")
    stopped(prepare(request), "denoise", 1)
    assert resume(tmp_path / "C.MP4")[0].request.output == tmp_path / "C.MP4"
    assert resume(tmp_path / "C.skyrun.safetensors")[0].request.output == tmp_path / "C.MP4"
