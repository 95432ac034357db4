"""One clip on several devices, which are processes of a CPU here: the same latents as of one, whatever is divided.

Workers are started once for each number of them, and make all clips.
"""

import dataclasses
import errno
import itertools
import operator
import os
import random
import re
import signal
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from loras import layers, random_pairs, write_adapter
from PIL import Image
from small_run import Raises, fail_in_workers, followed, of_kind, small_request, stopped
from test_forcing import request_of as forcing_request
from test_tasks_end_to_end import CASES as GOLDENS
from test_tasks_end_to_end import request_of as golden_request
from test_wan import request_of as wan_request
from wan_checkpoint import write_wan

from skyrun.cli import main
from skyrun.engine.resume import continue_or_start, resume
from skyrun.engine.run import run_job
from skyrun.engine.together import Lead, do_as_told, workers
from skyrun.errors import BAD_INPUT, FAILED, WILL_NOT_FIT, OutOfMemory, SkyrunError
from skyrun.events import BlockDone, FramesReady, Preview, Replanned, StageEnded, StageStarted, drain
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.models.dit_header import block_layouts, canonical_tensors
from skyrun.parallel import team as team_module
from skyrun.pipelines.state import RunState
from skyrun.planning.job import prepare
from skyrun.streaming.layout import with_adapters
from skyrun.streaming.stream import spread
from skyrun.tools.tiny_checkpoint import CheckpointDims, write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teams():
    """teams(2) is two workers, which stay for all tests of this file."""
    started = {}

    def start(size):
        if size not in started:
            started[size] = workers(size, CPU)
        return started[size]

    yield start
    for team in started.values():
        team.close()


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory):
    """four_heads("Q4_K") is a model of two blocks whose attention has four heads."""
    folder, done = tmp_path_factory.mktemp("four"), {}
    write_checkpoint(folder / "checkpoint", CheckpointDims(layers=2))

    def convert(quant):
        if quant not in done:
            done[quant] = folder / quant
            assert main(["convert", str(folder / "checkpoint"), "-o", str(done[quant]), "--quant", quant]) == 0
        return done[quant]

    return convert


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """wan("SkyReels-V2-DF-1.3B-540P", ...) is a converted model with four heads. dims: further ones."""
    done = {}

    def write(name, *kind, **dims):
        if name not in done:
            folder = tmp_path_factory.mktemp("wan")
            write_wan(folder / f"{name}-Diffusers", *kind, num_attention_heads=4, **dims)
            done[name] = folder / "out"
            assert main(["convert", str(folder / f"{name}-Diffusers"), "-o", str(done[name]), "--quant", "F32"]) == 0
        return done[name]

    return write


@pytest.fixture(scope="module")
def adapter(four_heads, tmp_path_factory):
    file = open_gguf(next(four_heads("Q8_0").glob("*transformer*.gguf"), None) or _transformer(four_heads("Q8_0")))
    shapes = {name: info.shape for name, info in canonical_tensors(file).items()}
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    write_adapter(path, random_pairs(shapes, [*layers(2), "time_embedding.0"], 4), "kohya", alpha=4)
    return path


def _transformer(folder):
    return max(folder.glob("*.gguf"), key=lambda path: "blocks.0.ffn.0.weight" in open_gguf(path).tensors)


@pytest.fixture(scope="module")
def request_for(four_heads, wan, converted, goldens, adapter, tmp_path_factory):
    """request_for("r2v") is a request by the name of a case."""
    folder = tmp_path_factory.mktemp("inputs")
    picture = folder / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(picture)

    def small(quant="Q8_0", **changes):
        return small_request(folder, four_heads(quant), **{"output": None, "frames": 9, "size": (48, 48)} | changes)

    def make(name):
        if name in GOLDENS:
            model = converted("Q8_0", "a2v" if name == "a2v" else "v2v")
            return golden_request(name, goldens(f"e2e/{GOLDENS[name]}/golden"), model, steps=2)
        if "forcing" in name:
            pipeline = "SkyReelsV2DiffusionForcingPipeline"
            model = wan("SkyReels-V2-DF-1.3B-540P", "SkyReels-V2", False, pipeline, inject_sample_info=True)
            changes = {"attention": "exact,sparse:20"} if "sparse" in name else {}
            windows = {"window_frames": 37, "condition_frames": 17, "ar_step": 1}
            return forcing_request("t2v", model, picture, 57, steps=2, **windows, **changes)
        if name == "t2v":
            return wan_request("Wan2.1-T2V-1.3B", wan("Wan2.1-T2V-1.3B"), picture, guidance=5.0, steps=2)
        if name == "i2v":
            model = wan("Wan2.1-I2V-14B-480P", "Wan2.1", True, added_kv_proj_dim=512)
            return wan_request("Wan2.1-I2V-14B-480P", model, picture, guidance=5.0, steps=2)
        if name == "adapter":
            return small(loras=(adapter,))
        return {
            "r2v": small,
            "Q4_K": lambda: small("Q4_K"),
            "int8": lambda: small("Q4_K", precision="fast"),
            "int8 attention": lambda: small(attention="full-int8"),
            "bfloat16": lambda: small(dtype="bfloat16"),
            "sparse": lambda: small(size=(64, 64), attention="exact,sparse:20"),
            "sparse, few tiles": lambda: small(attention="exact,sparse:20"),
            "sparse int8": lambda: small("Q4_K", size=(64, 64), attention="int8,sparse:20"),
            "nag": lambda: small(nag=4.0, negative_prompt="a blue sea"),
        }[name]()

    return make


@pytest.fixture(scope="module")
def alone(request_for):
    """alone("r2v") is the job of a case and what one process makes of it."""
    done = {}

    def make(name):
        if name not in done:
            job = prepare(request_for(name))
            done[name] = job, drain(run_job(job))
        return done[name]

    return make


def running_workers():
    """The worker processes that this process has started and that have not ended."""
    children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in children if "skyrun.engine.worker" in child.cmdline()]


def together(team, job, rows=None, state=None, **changes):
    """The result and the events of a job on a team. rows: tokens that pass through a block at a time."""
    job = dataclasses.replace(job, request=dataclasses.replace(job.request, devices=team.size))
    return followed(run_job(planned(job, token_rows=rows, **changes), True, state, False, team))


def planned(job, **changes):
    """The job with another plan."""
    return dataclasses.replace(job, plan=dataclasses.replace(job.plan, **changes))


def apart(result, expected):
    """The largest difference of latents, of the largest latent."""
    return float((result.latents - expected.latents).abs().max() / expected.latents.abs().max())


# What is made on how many devices, how many tokens pass at a time, and how far apart latents may be from those of one.
CASES = [
    ("r2v", 2, None, 1e-5),
    ("r2v", 4, 7, 1e-5),
    ("Q4_K", 4, 10, 1e-5),
    ("int8", 2, 10, 2e-2),
    ("int8 attention", 4, 10, 1e-3),  # rounding decides about codes
    ("bfloat16", 2, 10, 1e-1),
    ("adapter", 2, 10, 1e-5),
    ("sparse", 2, 10, 1e-5),
    ("sparse", 4, 10, 1e-5),
    ("sparse, few tiles", 4, None, 1e-5),  # one of the devices has none
    ("sparse int8", 4, 10, 1e-3),
    ("sparse forcing", 4, 20, 1e-5),
    ("nag", 2, 10, 1e-5),
    ("t2v", 4, 7, 1e-5),
    ("i2v", 4, None, 1e-5),
    ("forcing", 4, 20, 1e-5),
    ("shot", 2, 10, 1e-5),
    ("v2v", 2, 10, 1e-5),
    ("a2v", 2, 7, 1e-5),
]


@pytest.mark.parametrize(("name", "size", "rows", "limit"), CASES)
def test_the_clip_is_that_of_one_device(teams, alone, name, size, rows, limit):
    job, expected = alone(name)
    result, events = together(teams(size), job, rows)
    assert apart(result, expected) <= limit
    assert np.abs(result.frames.astype(int) - expected.frames).max() <= (1 if limit <= 1e-3 else 255)
    assert {type(event) for event in events} >= {Preview, StageStarted, StageEnded, BlockDone}
    assert_skips_alike(result, expected, "sparse" in name)


@pytest.mark.parametrize(
    ("name", "size", "resident"),
    [("r2v", 2, 2), ("Q4_K", 4, 0), ("adapter", 4, 1), ("nag", 2, 1)],
)
def test_weights_that_are_read_in_shares_are_those_of_one_device(teams, alone, name, size, resident):
    """In each step, and of blocks that stay too. Of these rank 0 reads its share from disk, once."""
    job, expected = alone(name)
    result, events = together(teams(size), job, 10, weights="shared", resident_blocks=resident)
    assert apart(result, expected) <= 1e-5
    blocks = with_adapters(block_layouts(job.files.transformer), "blocks.", job.files.adapters)
    kept, sizes = spread(resident, len(blocks)), [sum(one.nbytes for one in block.extents) for block in blocks]
    times = [1 if index in kept else job.request.steps for index in range(len(blocks))]
    (read,) = (event.bytes_read for event in events if isinstance(event, StageEnded) and event.stage == "denoise")
    assert read == pytest.approx(sum(map(operator.mul, sizes, times)) / size, rel=0.03)


def assert_skips_alike(result, expected, skips):
    """What is told of attention is told of the heads of all devices."""
    assert (result.skipped is not None) == (expected.skipped is not None) == skips
    if skips:
        assert vars(result.skipped) == pytest.approx(vars(expected.skipped), rel=1e-4)
        assert expected.skipped.density < 1


@pytest.mark.parametrize("name", ["r2v", "sparse"])
def test_a_clip_goes_on_with_any_number_of_devices(teams, alone, request_for, own_workers, tmp_path, name):
    """One step on two devices, one on one, the rest on four: the state is that of the clip alone."""
    _, expected = alone(name)
    job = prepare(dataclasses.replace(request_for(name), output=tmp_path / "clip.mp4"))
    job = planned(job, weights="shared")  # a block is on its way when the run is stopped
    stopped(dataclasses.replace(job, request=dataclasses.replace(job.request, devices=2)), "denoise", 1)
    assert not own_workers()
    job, state = resume(tmp_path / "clip.mp4", devices=1)
    assert 1 <= state.steps < job.request.steps
    stopped(job, "denoise", state.steps + 1, state)
    job, state = resume(tmp_path / "clip.mp4", devices=4)
    assert state.steps >= 2
    assert job.request.devices == 4
    result, _ = together(teams(4), job, 7, state)
    assert apart(result, expected) <= 1e-5
    assert_skips_alike(result, expected, name == "sparse")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 3}, "4 heads of attention cannot be divided among 3 devices"),
        ({"devices": 2, "device": "cuda:1"}, "--device cuda:1 is one card: leave it out, or --devices 2"),
        ({"devices": 0}, "got 0 devices, expected 1 to 64"),
        ({"devices": "two"}, "devices is 'two', expected a whole number"),
    ],
)
def test_what_cannot_be_divided(request_for, changes, message):
    with pytest.raises(SkyrunError, match=re.escape(message)) as caught:
        prepare(dataclasses.replace(request_for("r2v"), **changes))
    assert caught.value.code == BAD_INPUT
    if changes["devices"] == 3:
        assert caught.value.hint == "with this model --devices can be 1, 2 or 4"


@pytest.fixture
def own_workers(teams):
    """own_workers() are the workers that a test has started for itself."""
    there = {child.pid for child in running_workers()}
    return lambda: [child for child in running_workers() if child.pid not in there]


@pytest.mark.parametrize(("seed", "weights"), [(0, "own"), (1, "shared"), (2, "shared")])
def test_a_killed_worker_ends_the_run_and_the_clip_goes_on(alone, request_for, own_workers, tmp_path, seed, weights):
    _, expected = alone("r2v")
    chance = random.Random(seed)
    victim, moment = chance.randrange(2), chance.randrange(20)  # before frames are decoded
    request = dataclasses.replace(request_for("r2v"), output=tmp_path / "clip.mp4", devices=2)
    with pytest.raises(SkyrunError, match=rf"the worker of device {victim} was killed \(signal 9\)") as caught:
        for number, _ in enumerate(run_job(planned(prepare(request), weights=weights))):
            if number == moment:
                of_rank(own_workers(), victim).kill()
    assert caught.value.code == FAILED
    assert not own_workers()
    assert not (tmp_path / "clip.mp4").exists()
    job, state = continue_or_start(dataclasses.replace(request, devices=1))
    assert apart(drain(run_job(job, state=state)), expected) <= 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def of_rank(found, rank):
    return next(child for child in found if child.environ()["RANK"] == str(rank))


def test_a_worker_that_hangs_ends_the_run(request_for, own_workers, tmp_path, monkeypatch):
    request = dataclasses.replace(request_for("r2v"), output=tmp_path / "clip.mp4", devices=2)
    with pytest.raises(SkyrunError, match="device 1: did not answer for 3 s") as caught:
        for number, _ in enumerate(run_job(prepare(request))):
            if number == 20:
                of_rank(own_workers(), 1).send_signal(signal.SIGSTOP)
                monkeypatch.setattr(team_module, "_SILENT", 3)
    assert caught.value.code == FAILED
    assert not own_workers()
    assert resume(tmp_path / "clip.mp4")[1].encoded  # what rank 0 had


class CannotRead:
    """What a worker is sent whose disk breaks while blocks are read."""

    def __call__(self, group, send):
        count, read = itertools.count(), os.preadv

        def broken(file, buffers, offset):
            if threading.current_thread().name.startswith("read SkyReels") and next(count) == 3:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(file, buffers, offset)

        os.preadv = broken
        do_as_told(group, send)


@pytest.mark.parametrize(
    ("weights", "fails", "error", "said", "code"),
    [
        ("shared", CannotRead(), SkyrunError, "device 1: .*Input/output error", FAILED),
        ("own", Raises(MemoryError()), OutOfMemory, "out of memory on device 1", WILL_NOT_FIT),
    ],
)
def test_a_worker_that_fails_says_so(request_for, own_workers, monkeypatch, weights, fails, error, said, code):
    """Rank 0 waits for it: in the midst of a step, or would for days."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    job = planned(prepare(request_for("r2v")), weights=weights)
    team = workers(2, CPU)
    team.send(Lead(job, RunState()), fails)
    with pytest.raises(error, match=said) as caught:
        for _ in team.messages():
            pass
    assert caught.value.code == code
    team.close()
    assert not own_workers()


BLOCK, DECODER = "skyrun.models.dit.transformer.dit_block", "skyrun.models.vae.WanVAE._decoder"


@pytest.mark.parametrize(("name", "first", "calls", "before"), [("r2v", 0, (5, 1), 2), ("a2v", 1, (6, 13), 1)])
def test_out_of_memory_is_not_the_end(
    alone, request_for, own_workers, monkeypatch, tmp_path, name, first, calls, before
):
    """First one device lacks memory for a step, then the other one for frames. The clip is written or only returned,
    or is at its second window."""
    job, expected = alone(name)
    clip = tmp_path / "clip.mp4" if name == "r2v" else None
    job = prepare(dataclasses.replace(job.request, devices=2, output=clip))
    cases = [(first, BLOCK, (calls[0],)), (1 - first, DECODER, (calls[1],))]
    fail_in_workers(monkeypatch, tmp_path / "workers", cases)
    result, events = followed(run_job(job))
    assert apart(result, expected) <= 1e-5
    assert np.abs(result.frames.astype(int) - expected.frames).max() <= 1
    replanned = of_kind(events, Replanned)
    for stage, device, event in zip(("denoise", "decode"), (first, 1 - first), replanned, strict=True):
        assert event.text.startswith(
            f"{stage} is out of memory on device {device}: made to fail; going on from the last"
        )
    assert result.plan == replanned[-1].plan
    begun = [event.before for event in of_kind(events, StageStarted) if event.stage == "denoise"]
    assert [done for done in begun if done] == [before]
    ended, windows = [event.stage for event in of_kind(events, StageEnded)], len(job.windows)
    counts = {"load": windows + 1, "denoise": windows, "write": int(clip is not None)}
    assert {stage: ended.count(stage) for stage in counts} == counts
    assert sum(len(event.frames) for event in of_kind(events, FramesReady)) == len(expected.frames)
    assert not own_workers()
    assert [path.name for path in tmp_path.glob("*.*")] == (["clip.mp4"] if clip else [])


def test_out_of_memory_for_good(alone, request_for, own_workers, monkeypatch, tmp_path):
    job, expected = alone("r2v")
    job = prepare(dataclasses.replace(job.request, devices=2, output=tmp_path / "clip.mp4"))
    with monkeypatch.context() as patch:
        fail_in_workers(patch, tmp_path / "workers", [(1, BLOCK, range(1 << 20))], once=False)
        with pytest.raises(
            SkyrunError, match="denoise is out of memory on device 1: .*, and no plan takes less"
        ) as caught:
            drain(run_job(job))
    assert caught.value.code == WILL_NOT_FIT
    assert "close other programs" in caught.value.hint
    assert not own_workers()
    job, state = resume(tmp_path / "clip.mp4", devices=1)
    assert state.encoded
    assert apart(drain(run_job(job, state=state)), expected) <= 1e-5
