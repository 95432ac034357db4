"""Every shape of plan that any machine gets runs, here with the tiny model on the CPU."""

import dataclasses
import itertools

import pytest
from plans import clip_of
from small_run import small_request

from skyrun.engine.run import run_job
from skyrun.events import drain
from skyrun.planning.job import prepare
from skyrun.planning.what_if import request_workload
from skyrun.presets import choose
from skyrun.presets.autoencoder import Autoencoder
from skyrun.presets.machine.cards import CARDS, find_card
from skyrun.presets.machine.hardware import stated, stated_cpu
from skyrun.presets.memory import vae_memory_bytes
from skyrun.presets.plan import PREFERENCES


def denoising(plan, work):
    """What of a plan decides how steps are made, whatever the size of the clip."""
    parts = -(-work.tokens // plan.token_rows) if plan.token_rows else 1
    kept = "all" if plan.resident_blocks == work.layers else "some" if plan.resident_blocks else "none"
    return parts, plan.parked_tokens, kept, plan.precision, plan.dtype


def decoding(plan, work):
    """What of a plan decides how the autoencoder works."""
    return tuple(
        (round(work.height / how.tile[0]) if how.tile else 1, how.room is not None, how.dtype)
        for how in (plan.encoding, plan.decoding)
    )


def autoencoder(shape, way, work):
    slabs, waits, dtype = shape
    tile = None if slabs == 1 else (-(-work.height // slabs), work.width)
    return Autoencoder(dtype, tile, vae_memory_bytes(work, way, dtype) // 2 if waits else None, 0)


def shapes():
    """All there are, over cards, memories, disks, tasks, sizes, types and preferences."""
    kinds = [find_card("RTX 2060"), find_card("RTX 4070"), find_card("H200")]
    sizes = sorted({3, 4, 5, *(card.vram for card in CARDS)})
    machines = [stated(card, ram, 0.5, vram) for card in kinds for ram in (8, 64) for vram in sizes]
    machines += [stated_cpu(ram, disk) for ram in (8, 16, 32, 128) for disk in (0.1, 5)]
    clips = [clip_of(task, size) for task in ("r2v", "v2v") for size in ("480P", "720P")] + [clip_of("r2v", "720P", 12)]
    steps, vaes = set(), set()
    for clip in clips:
        work = request_workload(clip)
        for hardware, prefer in itertools.product(machines, PREFERENCES):
            plan = choose(hardware, work, prefer=prefer)
            if not plan.problem:
                steps.add(denoising(plan, work))
                vaes.add(decoding(plan, work))
    return sorted(steps), sorted(vaes)


@pytest.fixture(scope="module")
def model(converted):
    return converted("Q4_K")


def test_every_shape_runs(model, tmp_path):
    steps, vaes = shapes()
    assert {shape[1] for shape in steps} == {True, False} and {shape[2] for shape in steps} == {"all", "some", "none"}
    assert all({shape[way][0] for shape in vaes} >= {1, 8} for way in (0, 1))
    jobs = {frames: prepare(small_request(tmp_path, model, output=None, steps=1, frames=frames)) for frames in (1, 5)}
    for index in range(max(len(steps), len(vaes))):
        frames = 5 if index < len(vaes) else 1  # each way of the autoencoder once over several groups of frames
        job, work = jobs[frames], jobs[frames].workload
        parts, parked, kept, precision, dtype = steps[index % len(steps)]
        encoding, decoding = vaes[index % len(vaes)]
        plan = dataclasses.replace(
            job.plan,
            precision=precision,
            dtype=dtype,
            token_rows=None if parts == 1 else max(1, -(-work.tokens // parts)),
            parked_tokens=parked,
            resident_blocks={"none": 0, "some": 1, "all": work.layers}[kept],
            encoding=autoencoder(encoding, "encode", work),
            decoding=autoencoder(decoding, "decode", work),
        )
        result = drain(run_job(dataclasses.replace(job, plan=plan)))
        assert result.frames.shape == (frames, 32, 48, 3), plan
        assert result.latents.isfinite().all(), plan
