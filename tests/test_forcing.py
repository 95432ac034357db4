"""Diffusion forcing against diffusers' pipeline: one window and several, from a prompt and from a first frame."""

from types import MethodType

import numpy as np
import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline
from PIL import Image
from small_run import followed, is_at
from wan_checkpoint import SEED, scheduler, tokenizer, write_original, write_wan

from skyrun import Request
from skyrun.cli import main
from skyrun.engine.resume import resume
from skyrun.engine.run import run_job
from skyrun.events import StageStarted, WindowDone
from skyrun.media.pixels import first_frame
from skyrun.pipelines.conditioning import HISTORY_TIME
from skyrun.pipelines.forcing import _history_noise
from skyrun.planning.job import prepare
from skyrun.planning.problems import value_problems
from skyrun.planning.what_if import described_hardware, plan_request
from skyrun.tasks.windows import BLOCK, forcing_windows

PROMPT, NEGATIVE, STEPS, SIZE = "a man walking in the city", "a blue sea", 3, (32, 48)
WINDOW, HISTORY = 21, 9  # frames


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models("14B") is a folder of converted files, and the models that they were converted from."""
    done = {}

    def make(size, layout="diffusers"):
        if (size, layout) not in done:
            name = f"SkyReels-V2-DF-{size}-540P"
            folder = tmp_path_factory.mktemp("forcing") / f"{name}-Diffusers"
            told = {"inject_sample_info": True} if size == "1.3B" else {}
            parts = write_wan(folder, "SkyReels-V2", False, "SkyReelsV2DiffusionForcingPipeline", **told)
            if layout == "original":
                folder = folder.with_name(name)
                write_original(folder, parts)
            out = folder.parent / "out"
            assert main(["convert", str(folder), "-o", str(out), "--quant", "F32"]) == 0
            done[size, layout] = out, parts
        return done[size, layout]

    return make


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(path)
    return path


def request_of(task, folder, picture, frames, **changes):
    images = (picture,) if task == "i2v" else ()
    values = {"model": folder, "size": SIZE, "frames": frames, "steps": STEPS, "seed": SEED, "device": "cpu"}
    values |= {"negative_prompt": NEGATIVE, "condition_frames": HISTORY, "window_frames": WINDOW, "shift": 8.0}
    return Request(task, PROMPT, images, **values | {"guidance": 5.0} | changes)


def encoded(vae, pixels):
    """Normalised latents of a video [3, T, H, W]."""
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, 16, 1, 1, 1) for name in ("mean", "std"))
    return (vae.encode(pixels[None]).latent_dist.mode() - mean) / std


def decoded(vae, latents):
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, 16, 1, 1, 1) for name in ("mean", "std"))
    return vae.decode(latents * std + mean).sample[0].clamp(-1, 1)


@torch.inference_mode()
def latents_of(parts, job, monkeypatch):
    """What diffusers makes of a request: the windows' latents, with given frames prepared as the models' own code does.

    That code encodes the last frames of a window for the next one, where diffusers takes over latents. It takes the
    noise of given frames from torch's global generator, here it is the request's.
    """
    request, vae = job.request, parts["vae"]
    pipe = SkyReelsV2DiffusionForcingPipeline(tokenizer=tokenizer(), scheduler=scheduler(request.shift), **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer._set_ar_attention = lambda size: None  # the models' own code attends to all frames
    image, whole, noises = None, [], iter(())
    if request.images:
        frame, _ = first_frame(job.inputs.images[0], *SIZE, "bicubic")
        image = encoded(vae, frame)
    prepared = pipe.prepare_latents

    def prepare_latents(self, *arguments, video_latents=None, **more):
        nonlocal noises
        window = len(whole)
        if len(job.windows) > 1:
            noises = iter(_history_noise(job, window)[:, None])
        latents, count, prefix, length = prepared(*arguments, video_latents=video_latents, **more)
        if video_latents is not None:
            made = job.windows[window - 1]
            last = torch.cat((whole[-1], video_latents[:, :, -made.latents :]), 2) if window > 1 else video_latents
            prefix = encoded(vae, decoded(vae, last)[:, -request.condition_frames :])
            whole.append(prefix)
        else:
            whole.append(video_latents)
            prefix, length = (image, 1) if image is not None else (prefix, length)
        return latents, count, prefix, length

    pipe.prepare_latents = MethodType(prepare_latents, pipe)
    monkeypatch.setattr(torch, "randn_like", lambda _: next(noises))
    sizes = {"height": SIZE[0], "width": SIZE[1], "num_frames": job.frames, "num_inference_steps": STEPS}
    prompts = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": request.guidance}
    long = {"overlap_history": request.condition_frames, "base_num_frames": request.window_frames, "fps": job.fps}
    long |= {"ar_step": request.ar_step, "causal_block_size": BLOCK if request.ar_step else None}
    long |= {"addnoise_condition": int(HISTORY_TIME)} if len(job.windows) > 1 else {}
    generator = torch.Generator("cpu").manual_seed(SEED)
    return pipe(**prompts, **sizes, **long, generator=generator, output_type="latent").frames[0]


@pytest.mark.parametrize("frames", [13, 33, 41])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_latents_are_those_of_diffusers(models, picture, monkeypatch, task, frames):
    folder, parts = models("14B")
    job = prepare(request_of(task, folder, picture, frames))
    assert len(job.windows) == {13: 1, 33: 2, 41: 3}[frames] and job.request.variant == "df"
    made, _ = followed(run_job(job))
    expected = latents_of(parts, job, monkeypatch)
    assert made.latents.shape == expected.shape and made.frames.shape == (frames, *SIZE, 3)
    assert float((made.latents - expected).abs().max()) < 1e-3


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("fps", [24, 16])
def test_the_small_model_is_told_the_frame_rate(models, picture, monkeypatch, fps, layout):
    folder, parts = models("1.3B", layout)
    job = prepare(request_of("t2v", folder, picture, 13, fps=fps, guidance=1.0))
    made, _ = followed(run_job(job))
    assert made.fps == fps and job.request.variant == "df-1.3b"
    assert float((made.latents - latents_of(parts, job, monkeypatch)).abs().max()) < 1e-3


@pytest.mark.parametrize(("frames", "lag"), [(37, 2), (57, 2), (37, 5)])
def test_blocks_of_frames_may_lag_behind_each_other(models, picture, monkeypatch, frames, lag):
    folder, parts = models("14B")
    changes = {"window_frames": 37, "condition_frames": 17, "ar_step": lag}
    job = prepare(request_of("t2v", folder, picture, frames, **changes))
    assert job.request.passes == STEPS + min(lag, STEPS) == job.workload.steps
    made, events = followed(run_job(job))
    assert float((made.latents - latents_of(parts, job, monkeypatch)).abs().max()) < 1e-3
    stages = [event.total for event in events if isinstance(event, StageStarted) and event.stage == "denoise"]
    assert stages == [STEPS + min(lag, STEPS), STEPS][: len(job.windows)]


@pytest.mark.parametrize(
    ("task", "changes", "stop"),
    [("t2v", {"frames": 33}, 2), ("i2v", {"frames": 41}, 1), ("t2v", {"window_frames": 37, "ar_step": 2}, 3)],
)
@pytest.mark.parametrize("window", [0, 1])
def test_a_stopped_clip_goes_on_where_it_was(models, picture, tmp_path, task, changes, stop, window):
    folder, _ = models("14B")
    if "ar_step" in changes:
        changes = changes | {"frames": 57, "condition_frames": 17}
    whole, _ = followed(run_job(prepare(request_of(task, folder, picture, **changes))))
    job = prepare(request_of(task, folder, picture, output=tmp_path / "clip.mp4", **changes))
    events, left = run_job(job), window
    for event in events:
        left -= isinstance(event, WindowDone)
        if left == 0 and is_at(event, "denoise", stop):
            break
    events.close()
    job, state = resume(tmp_path / "clip.mp4")
    assert (state.window, state.steps) == (window, stop)
    result, _ = followed(run_job(job, state=state))
    assert torch.equal(result.latents, whole.latents) and np.array_equal(result.frames, whole.frames)


@pytest.mark.parametrize(("frames", "expected"), [(97, [(25, 0, 97)]), (101, [(25, 0, 97), (1, 5, 4)])])
def test_windows_of_a_clip(frames, expected):
    windows = forcing_windows(frames, 97, 17, 0)
    assert [(window.latents, window.others, window.frames) for window in windows] == expected


@pytest.mark.parametrize("frames", [257, 737, 1457])
def test_windows_make_the_lengths_that_the_authors_name(frames):
    for given in (0, 1):
        windows = forcing_windows(frames, 97, 17, given)
        assert sum(window.frames for window in windows) == frames
        assert {window.latents + window.others for window in windows} == {25}
        assert len(windows) == 1 + (frames - 97) // 80


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"variant": "t2v", "ar_step": 5}, "t2v has no --ar-step with this model"),
        ({"variant": "df", "ar_step": 5, "frames": 101}, "the nearest length is --frames 97"),
        ({"ar_step": 5, "frames": 33}, "the nearest length is --frames 37"),
        ({"variant": "df", "ar_step": -1}, "--ar-step -1, expected 0 or more"),
        ({"variant": "df", "ar_step": 1, "seconds": float("nan")}, "got nan seconds"),
        ({"variant": "df", "ar_step": 1, "seconds": 1e12}, "got 1e+12 seconds"),
        ({"variant": "df-720p", "fps": 16}, "--fps 16: the model has only 24"),
    ],
)
def test_what_a_model_does_not_do(changes, reason):
    assert any(reason in problem for problem in value_problems(Request("t2v", PROMPT, **changes)))


def test_a_clip_of_any_length_takes_no_more_memory():
    plans = [
        plan_request(Request("t2v", PROMPT, seconds=seconds, variant="df"), described_hardware(gpu="RTX 3060"))
        for seconds in (4.0, 30.0)
    ]
    assert [plan.workload.windows for plan in plans] == [1, 9]
    assert plans[0].plan.peak_bytes == plans[1].plan.peak_bytes
