"""Extension, shot switching and talking avatar from the published layout to frames, against upstream's clips."""

import pytest

from skyrun import Request
from skyrun.engine.run import run_job
from skyrun.events import LatentsReady
from skyrun.planning.job import prepare

CASES = {"v2v": "single_shot_extension", "shot": "shot_switching_extension", "a2v": "talking_avatar"}


def request_of(task, golden, model, **changes):
    """The request of a golden: its small windows are reached through what a Request can say."""
    config = golden.notes["config"]
    values = {"size": (config["height"], config["width"]), "seed": config["seed"], "device": "cpu", "model": model}
    if task == "a2v":
        values |= {"images": (golden.folder / config["image"],), "audio": golden.folder / config["audio"]}
        values |= {"window_frames": config["frame_num"], "steps": config["sampling_steps"]}
    else:
        values |= {"video": golden.folder / config["input_video"], "steps": config["num_inference_steps"]}
        values |= {"condition_frames": config["num_condition_frames"]}
    if task == "v2v":
        values |= {"seconds": config["duration"], "latent_rate": config["factor_num_frames"]}
    if task == "shot":
        values |= {"frames": config["num_frames"]}
    return Request(task, config["prompt"], **values | changes)


@pytest.fixture(scope="module")
def made(goldens, converted):
    """made("v2v") is the golden, the result of its request with F32 weights, and the latents of every window."""
    done = {}

    def make(task):
        if task not in done:
            golden = goldens(f"e2e/{CASES[task]}/golden")
            job = prepare(request_of(task, golden, converted("F32", "a2v" if task == "a2v" else "v2v")))
            latents, events = [], run_job(job)
            while True:
                try:
                    event = next(events)
                except StopIteration as stop:
                    done[task] = golden, stop.value, latents
                    break
                if isinstance(event, LatentsReady):
                    latents.append(event.latents)
        return done[task]

    return make


EXPECTED = {
    "v2v": [("out.latents_after_step8_w0", 1e-3), ("out.latents_after_step8_w1", 2e-2)],
    "shot": [("out.latents_after_step8", 1e-3)],
    "a2v": [(f"out.latent_final_p{index}", 1e-3) for index in range(4)],
}


@pytest.mark.parametrize("task", CASES)
def test_latents_are_upstreams(made, task):
    golden, result, latents = made(task)
    assert len(latents) == len(EXPECTED[task])
    for got, (name, limit) in zip(latents, EXPECTED[task], strict=True):
        expected = golden[name].view(16, *golden[name].shape[-3:])
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) < limit, name
    assert result.latents.shape[1] == sum(window.shape[1] for window in latents)


@pytest.mark.parametrize("task", CASES)
def test_frames_are_upstreams(made, task):
    golden, result, _ = made(task)
    expected = golden["out.frames"].numpy().astype(int)
    assert result.frames.shape == expected.shape
    difference = abs(result.frames.astype(int) - expected)
    assert difference.max() <= 3
    assert (difference > 0).mean() < 0.02
