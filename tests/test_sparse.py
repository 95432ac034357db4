"""Attention that skips tiles in a whole run: it learns, keeps to its bound, resumes, and is dense where it must be."""

from dataclasses import replace

import pytest
import torch
from small_run import followed, of_kind, small_request, stopped

from skyrun.engine.resume import continue_or_start
from skyrun.engine.run import run_job
from skyrun.events import Attended
from skyrun.planning.job import prepare


def made(request):
    job, state = continue_or_start(request)
    return followed(run_job(job, state=state))


@pytest.fixture
def model(converted):
    return converted("F32")


def test_with_a_bound_of_zero_it_is_the_dense_result(tmp_path, model):
    for precision in ("exact", "int8"):
        clips = [
            made(small_request(tmp_path, model, attention=attention, output=None))[0].latents
            for attention in (precision, f"{precision},sparse:0")
        ]
        assert torch.equal(*clips)


@pytest.mark.parametrize("attention", ["exact,sparse:20", "int8,sparse:20"])
def test_a_resumed_run_makes_the_same_clip(tmp_path, model, attention):
    whole, events = made(small_request(tmp_path, model, attention=attention, size=(64, 64)))
    seen = of_kind(events, Attended)
    assert len(seen) == 4 and seen[0].density == 1 and min(one.density for one in seen[1:]) < 1
    assert all(one.error <= 0.2 for one in seen)
    request = replace(small_request(tmp_path, model, attention=attention, size=(64, 64)), output=tmp_path / "again.mp4")
    stopped(prepare(request), "denoise", 2)
    job, state = continue_or_start(request)
    assert state.steps == 2
    again, later = followed(run_job(job, state=state))
    assert torch.equal(whole.latents, again.latents)
    assert of_kind(later, Attended) == seen[2:]
