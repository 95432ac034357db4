"""Several clips with one command, clips made again, and prompts from files and stdin."""

import io
import json
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from small_run import fail, small_request

from skyrun.cli import main
from skyrun.cli.batch import requests_of
from skyrun.cli.parser import parser
from skyrun.errors import BAD_INPUT, SkyrunError
from skyrun.media.video_writer import Format, read_request, writing_video
from skyrun.planning.request import Request
from skyrun.tasks import TASKS


@pytest.fixture
def told(converted, tmp_path, monkeypatch):
    """told("-p", "a sea") are the arguments for a clip of one frame."""
    monkeypatch.chdir(tmp_path)
    request = small_request(tmp_path, converted("Q8_0"))

    def arguments(*more):
        start = ["run", "r2v", "--image", str(request.images[0]), "--model", str(request.model), "--size", "32x48"]
        return [*start, "--frames", "1", "--steps", "1", "--device", "cpu", *more]

    return arguments


def clips(folder):
    return sorted(path.name for path in folder.glob("*.mp4"))


def test_a_clip_for_every_seed(told, tmp_path, capsys):
    assert main(told("-p", "a sea", "--seed", "3", "4")) == 0
    assert clips(tmp_path) == ["r2v-3.mp4", "r2v-4.mp4"]
    assert [read_request(tmp_path / name)["seed"] for name in clips(tmp_path)] == [3, 4]
    capsys.readouterr()
    first = (tmp_path / "r2v-3.mp4").stat().st_mtime_ns
    assert main(told("-p", "a sea", "--seed", "3", "4", "5")) == 0  # what is there is not made again
    assert capsys.readouterr().err.count("it is there already") == 2
    assert (tmp_path / "r2v-3.mp4").stat().st_mtime_ns == first
    assert main(told("-p", "a lake", "--seed", "3", "4")) == 2  # but that is another clip
    assert (tmp_path / "r2v-3.mp4").stat().st_mtime_ns == first
    assert main(told("-p", "a lake", "--seed", "3", "4", "--overwrite")) == 0
    assert read_request(tmp_path / "r2v-3.mp4")["prompt"] == "a lake"


def test_the_same_command_without_a_seed_finds_its_clip(told, tmp_path, capsys):
    made = told("-p", "a sea", "-o", "a.mp4")
    assert main(made) == 0
    seed = read_request(tmp_path / "a.mp4")["seed"]
    capsys.readouterr()
    assert main(made) == 0
    assert "it is there already" in capsys.readouterr().err
    assert main([*made, "--seed", str(seed ^ 1)]) == BAD_INPUT
    assert "differs in seed" in capsys.readouterr().err
    assert main([*made, "--steps", "2"]) == BAD_INPUT
    assert "differs in steps" in capsys.readouterr().err
    assert main([*made, "--overwrite"]) == 0
    assert read_request(tmp_path / "a.mp4")["seed"] != seed


def test_a_clip_for_every_prompt_and_seed(told, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa sea\n\n a lake \n", "utf-8")  # as Windows writes it
    assert main(told("--prompts", "prompts.txt", "--seed", "1", "2", "-o", "out/x.mp4")) == 0
    assert clips(tmp_path / "out") == ["x-1-1.mp4", "x-1-2.mp4", "x-2-1.mp4", "x-2-2.mp4"]
    said = [read_request(tmp_path / "out" / name) for name in clips(tmp_path / "out")]
    assert [(clip["prompt"], clip["seed"]) for clip in said] == [
        ("a sea", 1), ("a sea", 2), ("a lake", 1), ("a lake", 2)
    ]  # fmt: skip


def test_a_line_that_comes_twice_is_two_clips(told, tmp_path):
    (tmp_path / "prompts.txt").write_text("a sea\na sea\n-\n")  # the last is a prompt, not stdin
    assert main(told("--prompts", "prompts.txt", "--seed", "1", "2")) == 0
    said = [read_request(tmp_path / name) for name in clips(tmp_path)]
    assert [(clip["prompt"], clip["seed"]) for clip in said] == [
        (prompt, seed) for prompt in ("a sea", "a sea", "-") for seed in (1, 2)
    ]


def test_a_prompt_from_stdin_for_several_seeds(told, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a sea\n"))
    assert main(told("-p", "-", "--seed", "1", "2")) == 0
    assert [read_request(tmp_path / name)["prompt"] for name in clips(tmp_path)] == ["a sea", "a sea"]


def test_a_clip_that_fails_does_not_end_a_batch(told, tmp_path, monkeypatch, capsys):
    fail(monkeypatch, "skyrun.media.video_writer.VideoWriter.finish", lambda: OSError(28, "No space left"), (1,))
    assert main(told("-p", "a sea", "--seed", "1", "2", "3", "--json")) == 1
    assert clips(tmp_path) == ["r2v-1.mp4", "r2v-3.mp4"]
    out = capsys.readouterr()
    assert "1 of 3 clips failed: r2v-2.mp4" in out.err
    events = [json.loads(line) for line in out.out.splitlines()]
    assert [event["event"] for event in events if event["event"] in ("result", "error")] == [
        *("result", "error", "result")
    ]
    assert main(told("-p", "a sea", "--seed", "1", "2", "3")) == 0  # goes on with the one that failed
    assert clips(tmp_path) == ["r2v-1.mp4", "r2v-2.mp4", "r2v-3.mp4"]


OWN = ["x.skyrun.safetensors", "x.skyrun.0.safetensors", "x.SKYRUN.12.mkv", "other.skyrun.safetensors", "x.skyrun.lock"]


@pytest.mark.parametrize("name", OWN)
def test_names_that_a_run_uses_itself_are_no_outputs(told, tmp_path, capsys, name):
    for option in ("--save-latents", "--preview"):
        assert main(told("-p", "a sea", "--seed", "1", "-o", "x.mp4", option, name)) == 2
        assert f"{name} is a name that runs use for what is not finished" in capsys.readouterr().err
    assert not clips(tmp_path)


def test_latents_stay_when_the_clip_is_finished(told, tmp_path):
    assert main(told("-p", "a sea", "--seed", "1", "-o", "x.mp4", "--save-latents", "x.safetensors")) == 0
    assert (tmp_path / "x.safetensors").exists() and (tmp_path / "x.mp4").exists()


def test_a_prompt_from_stdin(told, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffa sea\nat night\n"))
    assert main(told("-p", "-", "--seed", "1")) == 0
    assert read_request(tmp_path / "r2v-1.mp4")["prompt"] == "a sea\nat night"
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert main(told("-p", "-")) == 2


def test_a_clip_made_again_with_another_seed(told, tmp_path, converted, capsys):
    assert main(told("-p", "a sea", "--seed", "3", "-o", "a.mp4")) == 0
    again = ["run", "--from", "a.mp4", "--device", "cpu"]  # with the same model, as long as it is there
    assert main([*again, "-o", "same.mp4"]) == 0
    assert main([*again, "--seed", "7", "--frames", "5", "-o", "other.mp4"]) == 0
    first, same, other = (read_request(tmp_path / f"{name}.mp4") for name in ("a", "same", "other"))
    assert first | {"output": "same.mp4"} == same
    assert first | {"output": "other.mp4", "seed": 7, "frames": 5} == other
    with av.open("a.mp4") as one, av.open("same.mp4") as two:
        frames = [next(container.decode(video=0)).to_ndarray() for container in (one, two)]
    assert (frames[0] == frames[1]).all()


def earlier(tmp_path, task, variant=None, **values):
    """A clip that says to be made by such a request, with all values of its model."""
    inputs = {"images": ("a.png",) * TASKS[task].images[0], "video": "v.mp4" if TASKS[task].video else None}
    inputs |= {"audio": "a.wav"} if TASKS[task].audio else {}
    request = Request(task, "a sea", variant=variant, **{"seed": 3, "size": (544, 960), **inputs, **values})
    with writing_video(tmp_path / "e.mp4", Format(32, 48, Fraction(24), request.as_json())) as writer:
        writer.add(np.zeros((1, 32, 48, 3), np.uint8))
    return "e.mp4"


def asked(*command):
    (request,) = requests_of(parser().parse_args(["run", *command]))
    return request


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("other", TASKS)
def test_another_task_has_its_own_values(tmp_path, monkeypatch, task, other):
    monkeypatch.chdir(tmp_path)
    variant = TASKS[task].model or None
    clip = earlier(tmp_path, task, variant, steps=3, loras=("x.safetensors",), quant="Q4_K", prefer="speed", nag=5.0)
    again = asked(other, "--from", clip)
    if other == task:
        assert (again.steps, again.nag, again.quant) == (3, 5.0, "Q4_K") and again.loras
        return
    shared = {"prompt": "a sea", "seed": 3, "prefer": "speed", "size": again.size}
    shared |= {"video": "v.mp4"} if TASKS[task].video and TASKS[other].video else {}
    assert again == Request(other, **shared)
    assert again.size == ((544, 960) if (544, 960) in _sizes(other) else None)


def _sizes(task):
    spec = TASKS[task]
    return [spec.size(resolution, 544, 960) for resolution in spec.resolutions]


def test_a_transition_stays_with_its_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = earlier(tmp_path, "shot", transition="cut-in")
    assert read_request(tmp_path / clip)["prompt"] != "a sea" == asked("v2v", "--from", clip).prompt


def test_another_model_has_its_own_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = earlier(tmp_path, "t2v", "wan2.1-t2v-1.3b", shift=3.0)
    again = asked("--from", clip, "--model", "t2v")
    assert (again.steps, again.guidance, again.negative_prompt, again.shift) == (None, None, None, 3.0)


def test_a_preview_of_each_of_several_clips(told, tmp_path):
    assert main(told("-p", "a sea", "--seed", "1", "2", "--preview", "p.png")) == 0
    assert clips(tmp_path) == ["r2v-1.mp4", "r2v-2.mp4"] and (tmp_path / "p.png").exists()


def test_what_can_be_seen_of_a_clip(told, tmp_path):
    assert main(told("-p", "a sea", "--seed", "1", "--preview", "p.png", "--sheet")) == 0
    with Image.open(tmp_path / "p.png") as preview, Image.open(tmp_path / "r2v-1.png") as sheet:
        assert preview.size == (4 * (24 + 4) - 4, 16)  # of 4 x 6 latents
        assert sheet.size == (4 * (48 + 4) - 4, 32)  # one frame, and room for three


MISTAKES = [
    (["run"], "say which task to run"),
    (["run", "r2v", "--image", "x.png"], "no prompt was given"),
    (["run", "--from", "x.mp4"], "x.mp4 is not a readable video"),
    (["run", "r2v", "--prompts", "x.txt"], "x.txt does not exist"),
    (["run", "r2v", "--prompts", "/dev/zero"], "/dev/zero is not a list of prompts: it is longer than"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) in (2, 4)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preview", "now.txt"], "now.txt does not end in .png"),
        (["--preview", "picture.png"], "picture.png is what the clip is made from, it would be lost"),
        (["--sheet", "-o", "picture.mp4"], "picture.png is what the clip is made from, it would be lost"),
    ],
)
def test_pictures_that_cannot_be_drawn(told, tmp_path, capsys, arguments, message):
    before = (tmp_path / "picture.png").read_bytes()
    assert main(told("-p", "a sea", *arguments)) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "picture.png").read_bytes() == before and not clips(tmp_path)


def test_a_clip_of_others_says_nothing(tmp_path, goldens):
    clip = goldens("e2e/single_shot_extension/golden").folder / "input.mp4"
    with pytest.raises(SkyrunError, match="does not say how it was made"):
        from skyrun.cli.batch import _made_before

        _made_before(clip, None, None)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--transition" in script and "a2v" in script


def test_events_for_scripts(told, capsys):
    assert main(told("-p", "a sea", "--seed", "1", "2", "--json")) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events].count("result") == 2
    wanted = {"plan", "stage_started", "stage_ended", "progress", "preview", "latents_ready"}
    assert wanted <= {e["event"] for e in events}
