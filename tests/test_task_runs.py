"""Runs of several windows: they go on where they ended, say what is wrong, and their files are as people want them."""

import dataclasses
import json
import re
from functools import cache

import av
import numpy as np
import pytest
import torch
from media_files import write_media
from PIL import Image
from small_run import fail, followed, of_kind
from test_footage import number_of, video
from test_tasks_end_to_end import CASES, request_of

from skyrun import run
from skyrun.cli import main
from skyrun.engine import checkpoint as keeper
from skyrun.engine.checkpoint import load_state
from skyrun.engine.output import state_path
from skyrun.engine.resume import continue_or_start, resume
from skyrun.engine.run import run_job
from skyrun.errors import SkyrunError
from skyrun.events import LatentsReady, Progress, Replanned, StageEnded, WindowDone, drain
from skyrun.media.video_writer import read_request
from skyrun.planning.job import prepare

LONG = ["v2v", "a2v"]  # of several windows


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A state after every step."""
    monkeypatch.setattr(keeper, "_SHARE", float("inf"))


@pytest.fixture(scope="module")
def small(goldens, converted):
    """small("v2v", folder) is a request of two steps for the golden's clip."""

    def make(task, folder=None, quant="Q8_0", **changes):
        golden = goldens(f"e2e/{CASES[task]}/golden")
        model = converted(quant, "a2v" if task == "a2v" else "v2v")
        output = folder / "clip.mp4" if folder else None
        return request_of(task, golden, model, **{"steps": 2, "output": output} | changes)

    return make


@pytest.fixture(scope="module")
def undisturbed(small):
    done = {}

    def make(task):
        if task not in done:
            done[task] = run(small(task))
        return done[task]

    return make


def same(result, expected):
    assert torch.equal(result.latents, expected.latents)
    assert np.array_equal(result.frames, expected.frames)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def stop_at(events, wanted):
    """Run up to the first event that is wanted, and stop as Ctrl-C does."""
    for event in events:
        if wanted(event):
            break
    events.close()


# Where a run of several windows is stopped, and how many of its windows are finished then.
STOPS = {
    "first window, denoising": (lambda e: isinstance(e, Progress) and e.stage == "denoise", 0),
    "first window, done": (lambda e: isinstance(e, WindowDone), 1),
    "second window, latents": (lambda e: isinstance(e, LatentsReady) and e.window == 1, 1),
}


@pytest.mark.parametrize("task", LONG)
@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_was_stopped_goes_on_to_the_same_frames(small, undisturbed, tmp_path, task, stop):
    request = small(task, tmp_path)
    wanted, windows = STOPS[stop]
    stop_at(run_job(prepare(request)), wanted)
    assert not request.output.exists()
    job, state = resume(request.output)
    assert state.window == windows
    result, events = followed(run_job(job, state=state))
    same(result, undisturbed(task))
    assert [event.index for event in of_kind(events, WindowDone)] == list(range(windows, len(job.windows)))
    assert not [event for event in of_kind(events, StageEnded) if event.stage == "text"]
    assert files(tmp_path) == ["clip.mp4"]


@pytest.mark.parametrize("task", LONG)
def test_killed_in_the_second_window(small, undisturbed, tmp_path, task):
    """What a kill leaves: the state of the last save, and the files of finished windows."""
    request = small(task, tmp_path)
    events = run_job(prepare(request))
    for event in events:
        if (
            isinstance(event, Progress)
            and event.stage == "decode"
            and (tmp_path / "clip.skyrun.0.safetensors").exists()
        ):
            break
    left = {path: path.read_bytes() for path in tmp_path.iterdir() if "partial" not in path.name}
    events.close()
    for path in tmp_path.iterdir():
        path.unlink()
    for path, content in left.items():
        path.write_bytes(content)
    same(run(request), undisturbed(task))
    assert files(tmp_path) == ["clip.mp4"]


@pytest.mark.parametrize("task", LONG)
def test_nothing_is_made_again_when_only_the_clip_could_not_be_written(small, undisturbed, tmp_path, monkeypatch, task):
    fail(
        monkeypatch,
        "skyrun.media.video_writer.VideoWriter.finish",
        lambda: OSError(28, "No space left on device"),
        (0,),
    )
    request = small(task, tmp_path)
    with pytest.raises(SkyrunError, match="cannot write .*clip.mp4"):
        run(request)
    job, state = continue_or_start(request)
    assert state.window == len(job.windows)
    result, events = followed(run_job(job, state=state))
    assert not of_kind(events, LatentsReady)
    same(result, undisturbed(task))


def test_a_finished_window_that_is_gone_is_said(small, tmp_path):
    request = small("v2v", tmp_path)
    stop_at(run_job(prepare(request)), STOPS["first window, done"][0])
    (tmp_path / "clip.skyrun.0.mkv").write_bytes(b"damaged")
    with pytest.raises(SkyrunError, match="what was finished of the clip cannot be read from .*clip.skyrun.0.mkv"):
        run(request)
    assert load_state(state_path(request.output))[0].window == 1


def test_a_full_disk_does_not_end_a_run(small, undisturbed, tmp_path, monkeypatch):
    fail(
        monkeypatch,
        "skyrun.engine.window_files.WindowStore.add",
        lambda: OSError(28, "No space left on device"),
        range(99),
    )
    result, events = followed(run_job(prepare(small("v2v", tmp_path))))
    assert any("cannot be kept" in getattr(event, "text", "") for event in events)
    same(result, undisturbed("v2v"))
    assert "clip.mp4" in files(tmp_path)


@pytest.mark.parametrize("task", CASES)
@pytest.mark.parametrize("place", ["skyrun.models.dit.transformer.dit_block", "skyrun.models.vae.WanVAE._decoder"])
def test_out_of_memory_is_not_the_end(small, undisturbed, tmp_path, monkeypatch, task, place):
    fail(monkeypatch, place, MemoryError, (1,))
    result, events = followed(run_job(prepare(small(task, tmp_path))))
    assert of_kind(events, Replanned)
    assert result.frames.shape == undisturbed(task).frames.shape
    assert abs(result.frames.astype(int) - undisturbed(task).frames).max() <= 1


@pytest.mark.parametrize("task", CASES)
def test_chunks_and_resident_blocks_change_nothing(small, undisturbed, task):
    job = prepare(small(task))
    plan = dataclasses.replace(job.plan, token_rows=7, resident_blocks=1)
    tiled = {way: dataclasses.replace(getattr(plan, way), tile=(16, 32)) for way in ("encoding", "decoding")}
    plan = dataclasses.replace(plan, **tiled)
    result = drain(run_job(dataclasses.replace(job, plan=plan)))
    assert float((result.latents - undisturbed(task).latents).abs().max()) < 2e-2
    assert abs(result.frames.astype(int) - undisturbed(task).frames).mean() < 0.05


# Relative error of all latents against F32, a third above what they are.
ERRORS = {("v2v", "Q8_0"): 0.0037, ("v2v", "Q4_K"): 0.046, ("shot", "Q8_0"): 0.0025, ("shot", "Q4_K"): 0.030}
ERRORS |= {("a2v", "Q8_0"): 0.014, ("a2v", "Q4_K"): 0.098}


@pytest.fixture(scope="module")
def exact_latents(small):
    return cache(lambda task: run(small(task, quant="F32")).latents)


@pytest.mark.parametrize(("task", "quant"), ERRORS)
def test_error_of_quantized_files(small, exact_latents, task, quant):
    exact, rounded = exact_latents(task), run(small(task, quant=quant)).latents
    error = float((rounded - exact).norm() / exact.norm())
    assert ERRORS[task, quant] / 100 < error < ERRORS[task, quant]


def test_speech_and_pictures_are_in_sync(small, tmp_path):
    request = small("a2v", tmp_path, steps=1)
    result = run(request)
    with av.open(str(request.output)) as container:
        pictures, speech = container.streams.video[0], container.streams.audio[0]
        assert float(pictures.average_rate) == 25
        frames = [frame.time for frame in container.decode(video=0)]
        container.seek(0)
        sound = [(frame.time, frame.to_ndarray()[0]) for frame in container.decode(audio=0)]
    assert len(frames) == len(result.frames) == 85
    assert frames == pytest.approx([index / 25 for index in range(85)], abs=1e-3)
    heard = np.concatenate([samples for _, samples in sound])
    assert speech.rate == 16000
    spoken = prepare(request).inputs.speech
    start = round(sound[0][0] * 16000)  # of what the decoder gives, in the time of the pictures
    lags = range(-400, 401)
    reference = spoken[8000:48000]
    scores = [np.dot(heard[8000 - start + lag : 48000 - start + lag], reference) for lag in lags]
    assert abs(lags[int(np.argmax(scores))]) <= 16  # a thousandth of a second
    ours = heard[8000 - start : 48000 - start]
    assert np.corrcoef(ours, reference)[0, 1] > 0.98


def test_a_film_that_goes_on(small, tmp_path):
    source = video(tmp_path / "source.mp4", count=12, rate=30)
    request = small("shot", tmp_path, video=source, join=True, transition="cut-away")
    result = run(request)
    with av.open(str(request.output)) as container:
        assert float(container.streams.video[0].average_rate) == 30
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 12 + len(result.frames)
    assert [number_of(frame) for frame in shown[:12]] == list(range(12))
    said = read_request(request.output)
    assert said["join"] is True and said["prompt"].startswith("[CUT_AWAY] ")


def test_the_sheet_of_a_joined_clip_shows_the_clip(small, tmp_path):
    source = video(tmp_path / "source.mp4", count=26)
    shot = arguments_of(small("shot"), "--video", source, "--seconds", 2, "--join", "-o", tmp_path / "x.mp4", "--sheet")
    assert main(shot) == 0
    with av.open(str(tmp_path / "x.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 26 + 49
    height, width = shown[0].shape[:2]
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    assert np.array_equal(sheet[:height, :width], shown[26])
    assert np.array_equal(sheet[-height:, -width:], shown[-1])


def arguments_of(request, *more):
    told = [str(request.model), "--size", "32x32", "--steps", "1", "--device", "cpu", "--seed", "1"]
    return ["run", request.task, "-p", request.prompt, "--model", *told, *map(str, more)]


def test_the_command_line_makes_clips_of_every_task(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    v2v, a2v = small("v2v"), small("a2v")
    long = video(tmp_path / "long.mp4", count=26)
    Image.new("RGBA", (40, 50), (200, 10, 10, 100)).save(tmp_path / "me.gif")
    runs = {
        "v2v": arguments_of(v2v, "--video", long, "--seconds", 5, "--join"),
        "shot": arguments_of(small("shot"), "--video", long, "--seconds", 2, "--transition", "cut-in"),
        "a2v": arguments_of(a2v, "--image", tmp_path / "me.gif", "--audio", a2v.audio, "--seconds", 1.0),
    }
    frames = {"v2v": 26 + 132, "shot": 49, "a2v": 25}
    for task, arguments in runs.items():
        assert main([*arguments, "--json"]) == 0, task
        out = capsys.readouterr().out
        result = json.loads(out.splitlines()[-1])
        assert result["output"] == f"{task}-1.mp4"
        with av.open(result["output"]) as container:
            assert sum(1 for _ in container.decode(video=0)) == frames[task]


MISTAKES = [
    ("v2v", [], "v2v takes a --video file"),
    ("v2v", ["--video", "{v}", "--seconds", "31"], "got 31 seconds, expected at least 5 and at most 30"),
    ("v2v", ["--video", "{v}", "--seconds", "7.5"], "v2v makes clips of whole seconds"),
    ("v2v", ["--video", "{v}", "--frames", "49"], "v2v has no --frames"),
    ("v2v", ["--video", "{v}", "--image", "{i}"], "v2v takes no --image"),
    ("v2v", ["--video", "{v}", "--transition", "cut-in"], "v2v has no --transition"),
    ("v2v", ["--video", "{v}"], "source.mp4 has 12 frames, 25 are needed to go on from"),
    ("v2v", ["--video", "{i}"], "source.mp4|me.png (has 1 frames|is not a readable video)"),
    ("shot", ["--video", "{v}", "--transition", "wipe"], "unknown transition 'wipe', expected cut-in, cut-out, "),
    ("shot", ["--video", "{v}", "--seconds", "6"], "got 6 seconds, expected at least 2 and at most 5"),
    ("a2v", ["--image", "{i}"], "a2v takes a --audio file"),
    ("a2v", ["--audio", "{a}"], "got 0 portraits, expected 1"),
    ("a2v", ["--audio", "{v}", "--image", "{i}"], "source.mp4 has no audio in it"),
    ("a2v", ["--audio", "{a}", "--image", "{i}", "--resolution", "540P"], "'540P', expected 480P, 720P"),
    ("a2v", ["--audio", "{a}", "--image", "{i}", "--join"], "a2v has no --join"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "arguments", "message"), MISTAKES)
def test_mistakes(small, tmp_path, capsys, task, arguments, message):
    places = {"{v}": video(tmp_path / "source.mp4"), "{i}": tmp_path / "me.png", "{a}": small("a2v").audio}
    Image.new("L", (40, 50)).save(places["{i}"])
    told = [str(places.get(argument, argument)) for argument in arguments]
    assert main(["run", task, "-p", "a sea", "--model", str(small(task).model), *told]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_unknown_tag_lists_the_known_ones(small):
    with pytest.raises(SkyrunError, match=r"unknown tag \[SIDEWAYS\] in the prompt, expected \[ZOOM_IN_CUT\], "):
        prepare(dataclasses.replace(small("shot"), prompt="[SIDEWAYS] a street"))


@pytest.mark.parametrize(("task", "model"), [("r2v", "v2v"), ("a2v", "v2v"), ("v2v", "a2v"), ("shot", "r2v")])
def test_a_model_of_another_task_is_refused_by_name(small, converted, task, model):
    request = small(task) if task != "r2v" else small("a2v")
    if task == "r2v":
        request = dataclasses.replace(request, task="r2v", audio=None, window_frames=81, steps=8)
    other = converted("Q8_0", model)
    with pytest.raises(SkyrunError, match=rf"is a model for (v2v|shot|{model}), not for {task}") as caught:
        prepare(dataclasses.replace(request, model=other))
    assert f"skyrun run {model}" in caught.value.hint or "skyrun run shot" in caught.value.hint


def test_what_is_odd_about_an_input_is_said_with_the_plan(converted, tmp_path, capsys):
    video = write_media(tmp_path / "a.mp4", 30, color_trc=18)
    command = ["run", "v2v", "-p", "a sea", "--video", str(video), "--model", str(converted("F32", "v2v"))]
    assert main([*command, "--device", "cpu", "--size", "32x48", "--dry-run", "--json"]) == 0
    said = capsys.readouterr()
    plan = json.loads(said.out.splitlines()[-1])
    assert all(notice in said.err for notice in plan["notices"])
    assert "a.mp4: it is HDR (HLG)" in plan["notices"][0]
