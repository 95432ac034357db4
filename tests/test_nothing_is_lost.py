"""Runs that memory, a disk or a user disturbs, at every stage: they end in the clip that nothing disturbed."""

import dataclasses
import gc

import numpy as np
import pytest
import torch
from small_run import STEPS, fail, followed, of_kind, small_request, stopped

from skyrun.engine import checkpoint as keeper
from skyrun.engine import recovery
from skyrun.engine.checkpoint import load_state
from skyrun.engine.output import state_path
from skyrun.engine.resume import resume
from skyrun.engine.run import run_job
from skyrun.errors import FAILED, WILL_NOT_FIT, SkyrunError
from skyrun.events import BlockDone, FramesReady, LatentsReady, Notice, Replanned, StageEnded, StageStarted, drain
from skyrun.planning.job import prepare
from skyrun.presets import Hardware, choose
from skyrun.presets.memory import GIB


def no_space():
    return OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def prepared(converted, tmp_path_factory):
    """A job and its outcome when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = prepare(small_request(folder, converted("Q8_0")))
    return job, drain(run_job(job))


@pytest.fixture
def job(prepared, tmp_path, monkeypatch):
    """The same with an output of its own, saved after every step."""
    monkeypatch.setattr(keeper, "_SHARE", float("inf"))
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path / "cache"))  # of prompts: the text encoder has to run
    job, _ = prepared
    return dataclasses.replace(job, request=dataclasses.replace(job.request, output=tmp_path / "out" / "clip.mp4"))


@pytest.fixture
def undisturbed(prepared):
    return prepared[1]


def same(result, undisturbed):
    assert torch.equal(result.latents, undisturbed.latents)
    assert np.array_equal(result.frames, undisturbed.frames)
    assert result.output.read_bytes() and not state_path(result.output).exists()


MOMENTS = [("text", 0), ("images", 0), ("images", 1), ("load", 0), *(("denoise", done) for done in range(STEPS + 1))]
MOMENTS += [("decode", 0), ("decode", 1), ("decode", 2), ("write", 0)]


@pytest.mark.parametrize(("stage", "done"), MOMENTS)
def test_a_run_that_is_stopped_goes_on(job, undisturbed, stage, done):
    stopped(job, stage, done)
    kept = state_path(job.request.output)
    assert list(kept.parent.iterdir()) == [kept]
    state, origin = load_state(kept)
    assert state.steps == (done if stage == "denoise" else STEPS if stage in ("decode", "write") else 0)
    assert origin.request.seed == 3
    before = state.steps
    result, events = followed(run_job(job, state=state))
    same(result, undisturbed)
    begun = [event.before for event in of_kind(events, StageStarted) if event.stage == "denoise"]
    assert begun == ([before] if before < STEPS else [])
    if stage in ("decode", "write"):
        assert [event.stage for event in of_kind(events, StageEnded)] == ["decode", "write"]


@pytest.mark.parametrize("done", range(1, STEPS + 1))
def test_what_a_killed_run_saved_last_goes_on(job, undisturbed, done):
    events = run_job(job)
    saved = state_path(job.request.output)
    while not saved.exists() or load_state(saved)[0].steps < done:
        next(events)
    content = saved.read_bytes()
    events.close()
    saved.write_bytes(content)
    same(drain(run_job(job, state=load_state(saved)[0])), undisturbed)


PLACES = {
    "text": ("skyrun.models.umt5.umt5_block", (1,)),
    "images": ("skyrun.models.vae.WanVAE.sample", (0,)),
    "load": ("skyrun.pipelines.stages.DiT", (0,)),
    "denoise: first step": ("skyrun.models.dit.transformer.dit_block", (1,)),
    "denoise: third step": ("skyrun.models.dit.transformer.dit_block", (5,)),
    "denoise: the sampler": ("skyrun.pipelines.samplers.UniPC._predict", (2,)),
    "decode: first group": ("skyrun.models.vae.WanVAE._decoder", (0,)),
    "decode: second group": ("skyrun.models.vae.WanVAE._decoder", (1,)),
}
ERRORS = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
    MemoryError,
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_is_not_the_end(job, undisturbed, monkeypatch, place):
    error = ERRORS[list(PLACES).index(place) % len(ERRORS)]
    fail(monkeypatch, PLACES[place][0], error, PLACES[place][1])
    result, events = followed(run_job(job))
    (replanned,) = of_kind(events, Replanned)
    stage = place.split(":")[0]
    assert replanned.text.startswith(f"{stage} is out of memory: ") and "\n" not in replanned.text
    assert "going on from the last finished step with a plan that takes" in replanned.text
    assert result.plan == replanned.plan != job.plan
    assert result.plan.limit_bytes == job.plan.limit_bytes
    ended = [event.stage for event in of_kind(events, StageEnded)]
    assert {name: ended.count(name) for name in ended} == dict.fromkeys(
        ("text", "images", "load", "denoise", "decode", "write"), 1
    ) | {"load": 2 if stage == "denoise" else 1}
    assert len(of_kind(events, BlockDone)) == blocks_of(place, job)
    # Of this little model only the autoencoder's tiles change, which does to its numbers what rounding does.
    close = 1e-4 if stage in ("text", "images") else 0.0
    torch.testing.assert_close(result.latents, undisturbed.latents, rtol=close, atol=close)
    assert sum(len(event.frames) for event in of_kind(events, FramesReady)) == 5
    assert np.abs(result.frames.astype(int) - undisturbed.frames).max() <= 1


def blocks_of(place, job):
    """How many blocks of both models a run goes through that fails there: those of the unfinished step twice."""
    extra = {"text": 1, "denoise: first step": 1, "denoise: third step": 1, "denoise: the sampler": job.workload.layers}
    return job.workload.text_layers + STEPS * job.workload.layers + extra.get(place, 0)


def test_out_of_memory_several_times(job, undisturbed, monkeypatch):
    fail(monkeypatch, "skyrun.models.dit.transformer.dit_block", MemoryError, (3, 6))
    fail(monkeypatch, "skyrun.models.vae.WanVAE._decoder", MemoryError, (1,))
    result, events = followed(run_job(job))
    assert len(of_kind(events, Replanned)) == 3
    assert torch.equal(result.latents, undisturbed.latents)
    assert np.abs(result.frames.astype(int) - undisturbed.frames).max() <= 1


@pytest.mark.parametrize("place", ["skyrun.models.umt5.umt5_block", "skyrun.models.dit.transformer.dit_block"])
def test_out_of_memory_for_good(job, undisturbed, monkeypatch, place):
    fail(monkeypatch, place, MemoryError, range(3 if "dit" in place else 0, 1 << 20))
    with pytest.raises(SkyrunError, match="is out of memory: .* and no plan takes less") as caught:
        drain(run_job(job))
    assert caught.value.code == WILL_NOT_FIT
    assert "close other programs" in caught.value.hint
    kept = state_path(job.request.output)
    if "dit" in place:
        assert load_state(kept)[0].steps == 1
        monkeypatch.undo()
        assert torch.equal(drain(run_job(job, state=load_state(kept)[0])).latents, undisturbed.latents)
    else:
        assert not kept.exists()


def test_what_is_no_lack_of_memory_is_not_tried_again(job, monkeypatch):
    fail(monkeypatch, "skyrun.models.dit.transformer.dit_block", lambda: RuntimeError("shapes do not fit"), (2,))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        drain(run_job(job))
    assert load_state(state_path(job.request.output))[0].steps == 1


def test_nothing_of_the_failed_attempt_stays_in_memory(job, monkeypatch):
    """When the smaller plan is made, the blocks and activations of the larger one are gone."""
    held = []

    def choose_(*arguments, **keywords):
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dtype == torch.uint8]
        held.append(sum(t.nbytes for t in tensors if t.nbytes >= job.workload.block_bytes))
        return choose(*arguments, **keywords)

    monkeypatch.setattr(recovery, "choose", choose_)
    fail(monkeypatch, "skyrun.models.dit.transformer.dit_block", MemoryError, (3,))
    drain(run_job(job))
    assert held == [0]


LARGE = {"dim": 5120, "ffn_dim": 13824, "layers": 40, "block_bytes": 373_000_000, "outer_bytes": 400_000_000}
LARGE |= {"height": 720, "width": 1280, "frames": 121, "latent_frames": 35, "vae_base_dim": 96}
LARGE |= {"vae_weights": 127_000_000, "text_dim": 4096, "text_block_bytes": 200_000_000}


def on_a_card(job, monkeypatch, **limits):
    """The job as it would be for the 14B model on a card of 12 GiB."""
    hardware = Hardware("cuda", "a card", 12 * GIB, 11 * GIB, 32 * GIB, 24 * GIB)
    monkeypatch.setattr(recovery, "probe", lambda device: hardware)
    workload = dataclasses.replace(job.workload, **LARGE)
    request = dataclasses.replace(job.request, size=(720, 1280), frames=121, **limits)
    plan = choose(hardware, workload, max_vram=request.max_vram, max_ram=request.max_ram)
    return dataclasses.replace(job, request=request, height=720, width=1280, workload=workload, plan=plan)


@pytest.mark.parametrize("stage", ["text", "images", "load", "denoise", "decode"])
@pytest.mark.parametrize("max_vram", [None, 8.0])
def test_plans_shrink_until_there_is_none(job, monkeypatch, stage, max_vram):
    job = on_a_card(job, monkeypatch, max_vram=max_vram)
    name = "denoise" if stage == "load" else stage
    taken = []
    for _ in range(50):
        taken.append(next(planned.device_bytes for planned in job.plan.stages if planned.name == name))
        smaller = recovery._smaller(job, recovery._SHRINK * recovery._taken(job.plan, stage))
        if smaller is None:
            break
        assert smaller.limit_bytes == job.plan.limit_bytes and not smaller.problem
        assert (smaller.dtype, smaller.precision) == (job.plan.dtype, job.plan.precision)
        job = dataclasses.replace(job, plan=smaller)
    assert smaller is None
    assert taken == sorted(taken, reverse=True)
    assert taken[0] <= (max_vram or 12) * GIB
    if stage in ("denoise", "decode"):
        assert taken[-1] < 0.7 * taken[0]


def test_a_plan_that_would_need_more_ram_is_none(job, monkeypatch):
    job = on_a_card(job, monkeypatch, max_ram=1.5)
    assert max(stage.host_bytes for stage in job.plan.stages) < 1.5 * GIB
    assert recovery._smaller(job, 4 * GIB) is None


def test_what_would_fit_is_said(job, monkeypatch):
    job = on_a_card(job, monkeypatch)
    assert recovery._what_fits(job, 0.1 * GIB) == ""
    said = recovery._what_fits(job, 4.5 * GIB)
    frames = int(said.split("--frames ")[1].split()[0])
    assert 1 < frames < 121 and frames % 4 == 1
    assert "--resolution 480P" in said or "--resolution 540P" in said
    assert said.endswith("would fit in 4.5 GiB")


def test_a_state_that_cannot_be_saved_does_not_stop_the_run(job, undisturbed, monkeypatch):
    fail(monkeypatch, "skyrun.engine.checkpoint.save_state", no_space, range(100))
    result, events = followed(run_job(job))
    (notice,) = of_kind(events, Notice)
    assert "No space left" in notice.text and str(state_path(job.request.output)) in notice.text
    same(result, undisturbed)


def test_a_disk_that_is_full_for_a_while_costs_nothing(job, undisturbed, monkeypatch):
    """What was saved before stays when a later save fails."""
    fail(monkeypatch, "skyrun.engine.checkpoint.save_file", no_space, range(3, 100))
    stopped(job, "denoise", 3)
    kept = state_path(job.request.output)
    assert list(kept.parent.iterdir()) == [kept]
    assert load_state(kept)[0].steps == 1
    monkeypatch.undo()
    same(drain(run_job(job, state=load_state(kept)[0])), undisturbed)


@pytest.mark.parametrize(
    "place", ["skyrun.media.video_writer.VideoWriter.add", "skyrun.media.video_writer.VideoWriter.finish"]
)
def test_a_clip_that_cannot_be_written_can_be_written_later(job, undisturbed, monkeypatch, place):
    job = dataclasses.replace(job, request=dataclasses.replace(job.request, overwrite=True))
    job.request.output.parent.mkdir()
    job.request.output.write_text("the old clip")
    fail(monkeypatch, place, no_space, (0,))
    with pytest.raises(SkyrunError, match="cannot write .*clip.mp4: .*No space left") as caught:
        drain(run_job(job))
    assert caught.value.code == FAILED
    kept = state_path(job.request.output)
    assert sorted(kept.parent.iterdir()) == [job.request.output, kept]
    assert job.request.output.read_text() == "the old clip"
    again, state = resume(job.request.output, overwrite=True)
    result, events = followed(run_job(again, state=state))
    assert [event.stage for event in of_kind(events, StageEnded)] == ["decode", "write"]
    same(result, undisturbed)


def test_latents_that_cannot_be_written_can_be_written_later(job, tmp_path, monkeypatch):
    place = tmp_path / "latents.safetensors"
    job = dataclasses.replace(job, request=dataclasses.replace(job.request, save_latents=place))
    fail(monkeypatch, "skyrun.engine.clip.save_file", no_space, (0,))
    with pytest.raises(SkyrunError, match="cannot write .*latents.safetensors"):
        drain(run_job(job))
    assert job.request.output.exists() and not place.exists()
    drain(run_job(job, state=load_state(state_path(job.request.output))[0]))
    assert place.exists() and not state_path(job.request.output).exists()


def test_saving_takes_a_small_share_of_the_time(job, monkeypatch):
    monkeypatch.setattr(keeper, "_SHARE", 0.05)
    clock = [0.0]
    saves = []
    monkeypatch.setattr(keeper, "now", lambda: clock[0])

    def save(*_):
        saves.append(clock[0])
        clock[0] += 2.0

    monkeypatch.setattr(keeper, "save_state", save)
    for event in run_job(job):
        if isinstance(event, BlockDone):
            clock[0] += 10.0
        if isinstance(event, LatentsReady):
            at_the_end = clock[0]
    gaps = np.diff(saves[:-1])
    assert len(saves) > 2 and min(gaps) >= 2.0 / 0.05
    assert saves[-1] == at_the_end - 2.0  # before decoding in any case


def test_a_run_without_a_clip_keeps_nothing_on_disk(job, tmp_path):
    job = dataclasses.replace(job, request=dataclasses.replace(job.request, output=None))
    stopped(job, "denoise", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
