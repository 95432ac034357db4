"""The small model that skyrun carries: clips show what their prompts say, and types lose as little as they should."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from skyrun.cli import main
from skyrun.hub.built_in import CHECKPOINT
from skyrun.media.video_reader import frames_at
from skyrun.quant import convert

with pytest.MonkeyPatch.context() as patch:  # training is not part of the package
    patch.syspath_prepend(str(Path(__file__).parent.parent))
    from training.clips import USUAL
    from training.nearest import nearest
    from training.report import REPORT, digests
    from training.requests import drawn_request, make, psnr

LEAST = {"Q8_0": 55, "Q6_K": 48, "Q5_K_M": 45, "Q4_K_M": 40, "Q3_K_M": 33, "Q2_K": 25}  # dB, in the mean
JUDGED = 6
TIMES = range(0, USUAL, 4)  # the frames that are a latent frame's last


def run_command(request, output):
    """The command that makes the clip of a request with the model that skyrun carries."""
    images, size = map(str, request.images), "x".join(map(str, request.size))
    asked = ["-p", request.prompt, "--image", *images, "--size", size, "--seed", str(request.seed)]
    return ["run", "r2v", "--model", "demo:Q4_K_M", "--device", "cpu", *asked, "-o", str(output)]


def shown(clip, size):
    """Frames of a clip in 0 to 1, without the enlargement of the mp4."""
    frames = np.stack(list(frames_at(clip, TIMES))).astype(np.float32) / 255
    scale = frames.shape[1] // size[0]
    return frames.reshape(len(TIMES), size[0], scale, size[1], scale, 3).mean((2, 4))


def test_clips_show_what_their_prompts_say(tmp_path):
    wrong = []
    for seed in range(24):
        clip, request = drawn_request(seed, "shown", tmp_path)
        assert main(run_command(request, tmp_path / f"{seed}.mp4")) == 0
        scene = clip.references[1] if len(clip.references) > 1 else np.ones_like(clip.references[0])
        frames = shown(tmp_path / f"{seed}.mp4", request.size)
        found = nearest(frames, scene, clip.topic.scene, TIMES, USUAL)
        if found != clip.topic:
            wrong.append((clip.topic, found))
    assert len(wrong) <= 2, wrong


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Requests, and the clips that F32 weights make of them."""
    folder = tmp_path_factory.mktemp("exact")
    convert(CHECKPOINT, folder / "F32", "F32")
    drawn = [drawn_request(number, "ladder", folder)[1] for number in range(JUDGED)]
    requests = [replace(request, model=folder / "F32") for request in drawn]
    return [(request, make(request)) for request in requests]


@pytest.mark.parametrize("quant", LEAST)
def test_a_type_loses_little(exact, quant, tmp_path):
    convert(CHECKPOINT, tmp_path, quant)
    ratios = [psnr(make(replace(request, model=tmp_path)).frames, wanted.frames) for request, wanted in exact]
    assert np.mean(ratios) >= LEAST[quant], ratios


def test_the_seed_chooses_what_the_prompt_leaves_open(exact):
    request = next(request for request, _ in exact if "still" in request.prompt)
    clips = [make(replace(request, seed=seed)).frames for seed in range(8)]
    assert min(psnr(one, two) for one, two in combinations(clips, 2)) < 20


def test_the_checkpoint_is_what_the_report_is_about():
    report = json.loads((CHECKPOINT / REPORT).read_text())
    assert report["files"] == digests(CHECKPOINT)
    assert report["judged"]["trained"]["all"] >= 0.9
