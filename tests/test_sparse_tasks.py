"""Attention that skips, in every kind of sequence: several windows, frames of unlike times, speech, two contexts."""

import numpy as np
import pytest
import torch
from small_run import followed, of_kind
from test_forcing import models, picture
from test_forcing import request_of as forcing_request
from test_tasks_end_to_end import CASES, request_of

from skyrun.engine.resume import continue_or_start
from skyrun.engine.run import run_job
from skyrun.events import Attended, StageStarted, WindowDone
from skyrun.kernels import selection
from skyrun.kernels.tiles import Tiles
from skyrun.kernels.torch import selection as torch_selection
from skyrun.planning.job import prepare

__all__ = ["models", "picture"]  # fixtures
BOUND = 0.3


@pytest.fixture(scope="module")
def small(goldens, converted):
    """small("v2v", folder) is a request of three steps for the golden's clip, with attention that skips."""

    def make(task, folder, **changes):
        model = converted("F32", "a2v" if task == "a2v" else "v2v")
        values = {"steps": 3, "output": folder / "clip.mp4", "attention": f"exact,sparse:{100 * BOUND:g}"}
        return request_of(task, goldens(f"e2e/{CASES[task]}/golden"), model, **values | changes)

    return make


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Tiles so small that there are some to skip in a few frames, and trust in means that do not deserve it."""
    monkeypatch.setattr(selection, "SMALL", Tiles(4, 2))
    monkeypatch.setattr(torch_selection, "ALIKE", 0.0)


def assert_kept_to_the_bound(seen, steps):
    """The first step of every window is dense, others skip something and say what it cost."""
    assert all(one.density == 1 and not one.error for one in seen[::steps])
    assert min(one.density for one in seen) < 1 and 0 < max(one.error for one in seen) <= BOUND


def test_frames_far_away_in_time(small, tmp_path):
    result, events = followed(run_job(prepare(small("shot", tmp_path))))
    assert_kept_to_the_bound(of_kind(events, Attended), 3)
    dense = followed(run_job(prepare(small("shot", tmp_path, output=None, attention="exact"))))[0].latents
    assert 0 < float((result.latents - dense).norm() / dense.norm()) < 2 * BOUND


@pytest.mark.parametrize("task", ["v2v", "a2v"])
def test_every_window_learns_anew_and_a_clip_goes_on_as_if_nothing_had_happened(small, tmp_path, task):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, events = followed(run_job(prepare(small(task, tmp_path / "whole"))))
    assert of_kind(events, WindowDone)
    assert_kept_to_the_bound(of_kind(events, Attended), 3)
    request, steps = small(task, tmp_path / "cut"), 0
    interrupted = run_job(prepare(request))
    for event in interrupted:  # after the second step of the second window
        steps += isinstance(event, Attended)
        if steps == 5 and not isinstance(event, Attended):
            break
    interrupted.close()
    job, state = continue_or_start(request)
    assert state.window == 1 and state.steps == 2
    again, later = followed(run_job(job, state=state))
    assert torch.equal(again.latents, whole.latents) and np.array_equal(again.frames, whole.frames)
    assert again.skipped == whole.skipped
    assert of_kind(later, Attended) == of_kind(events, Attended)[5:]


@pytest.mark.parametrize(("task", "frames", "changes"), [("t2v", 33, {}), ("i2v", 21, {}), ("t2v", 17, {"ar_step": 2})])
def test_guidance_and_frames_of_unlike_times(models, picture, task, frames, changes):
    folder = models("1.3B" if changes else "14B")[0]
    request = forcing_request(task, folder, picture, frames, attention=f"exact,sparse:{100 * BOUND:g}", **changes)
    result, events = followed(run_job(prepare(request)))
    seen = of_kind(events, Attended)
    windows = sum(isinstance(e, StageStarted) and e.stage == "denoise" for e in events)
    assert_kept_to_the_bound(seen, len(seen) // windows)
    assert seen[0].heads % 2 == 0 and result.latents.isfinite().all()
