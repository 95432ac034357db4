"""Plans for cards against the memory that torch's allocator would reserve for them (benchmarks/block_memory.py)."""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from loras import published_adapter

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from allocator import MIB, Allocator, OutOfMemory
from block_memory import cases, live_bytes, recorded, replay

from skyrun.kernels.machine.capability import OLDEST
from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request
from skyrun.presets import memory
from skyrun.presets.machine.cards import CARDS, find_card
from skyrun.presets.machine.hardware import stated
from skyrun.tasks import TASKS

del sys.path[0]


def unlike(planned):
    """Of plans for cards those that differ in what decides over memory: the others need no replay."""

    def decides(p):
        plan = p.plan
        rows = plan.token_rows, plan.parked_tokens, plan.resident_blocks
        return plan.limit_bytes, rows, way(p), plan.attention, bool(plan.sparse), p.workload

    return {decides(p): p for p in planned}.values()


def way(planned):
    plan = planned.plan
    return memory.way_of(True, planned.hardware.capability, plan.dtype, plan.precision == "fast")


@pytest.fixture(scope="module")
def replays():
    """For every card, task, resolution and way of computing."""
    return [replay(planned) for planned in unlike(cases(CARDS))]


def test_every_plan_stays_within_its_limit(replays):
    assert {one.way for one in replays} == {"exact", "float16 sums", "int8", "plain"}
    assert {one.planned.workload.task for one in replays} == set(TASKS)
    out = [one for one in replays if one.reserved is None or one.reserved > one.limit]
    assert not [(one.planned.hardware.name, one.planned.workload.task, one.way) for one in out]


def test_where_blocks_are_kept_nine_tenths_of_the_limit_are_used(replays):
    kept = [one for one in replays if 0 < one.planned.plan.resident_blocks < one.planned.workload.layers]
    assert len(kept) > 50
    assert min(one.reserved / one.limit for one in kept if one.planned.workload.contexts == 1) >= 0.9
    assert min(one.reserved / one.limit for one in kept) >= 0.86  # guidance may need what holes take


def is_counted(one):
    """Whether what a plan counts is what its tensors take, nearly."""
    most = 1.1 if one.planned.plan.sparse else 1.03  # keys are quantized before there are queries
    libraries = memory.ALLOCATOR_BYTES + memory.NCCL_BYTES * (one.planned.workload.devices > 1)
    return 0.985 <= (one.counted - libraries) / live_bytes(one) <= most


def test_what_is_counted_is_what_a_block_takes(replays):
    """Without the pages of the allocator and libraries. A plan that keeps all blocks counts a ring too."""
    for one in (one for one in replays if one.planned.plan.resident_blocks < one.planned.workload.layers):
        assert is_counted(one), one


def test_with_segments_of_fixed_size_plans_would_run_out(replays):
    assert any(replay(one.planned, expandable=False).reserved is None for one in replays)


def test_plans_for_windows_stay_within_their_limit_with_segments_of_fixed_size():
    sizes = {card.vram: card for card in CARDS if card.capability >= OLDEST}
    replays = [replay(planned, expandable=False) for planned in unlike(cases(sizes.values(), "Windows"))]
    assert {one.way for one in replays} == {"exact", "float16 sums", "int8"} and len(replays) > 100
    out = [one for one in replays if one.reserved is None or one.reserved > one.limit]
    assert not [(one.planned.hardware.name, one.planned.workload.task, one.way) for one in out]


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_plans_with_an_adapter_stay_within_their_limit(tmp_path, precision):
    request = Request("r2v", "", resolution="720P", loras=(published_adapter(tmp_path / "a.safetensors", "r2v"),))
    for name in ("RTX 3060", "RTX 4060", "RTX 4090"):
        planned = plan_request(request, stated(find_card(name), 64, 2.0), precision=precision)
        one, without = replay(planned), plan_request(replace(request, loras=()), planned.hardware, precision=precision)
        assert planned.workload.block_bytes > without.workload.block_bytes and not planned.plan.problem
        assert one.reserved is not None and one.reserved <= one.limit
        assert live_bytes(one) <= 1.02 * (one.counted - memory.ALLOCATOR_BYTES)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_plans_with_normalized_attention_guidance_stay_within_their_limit(precision):
    for task, name in product(("r2v", "a2v", "i2v"), ("RTX 3060", "RTX 4060", "RTX 4090")):
        request = Request(task, "", resolution="720P" if task != "i2v" else None, nag=11.0)
        planned = plan_request(request, stated(find_card(name), 64, 2.0), precision=precision)
        one = replay(planned)
        assert one.reserved is not None and one.reserved <= one.limit
        assert is_counted(one), planned
        assert live_bytes(one) != live_bytes(replay(plan_request(replace(request, nag=None), planned.hardware)))


@pytest.mark.parametrize("attention", ["exact", "exact,sparse", "full-int8,sparse"])
def test_plans_for_several_devices_stay_within_their_limit(attention):
    for name, devices in product(("RTX 3060", "RTX 4090"), (2, 4)):
        request = Request("r2v", "", resolution="720P", devices=devices)
        planned = plan_request(request, stated(find_card(name), 64, 2.0), attention=attention)
        one = replay(planned)
        assert one.reserved is not None and one.reserved + memory.NCCL_BYTES <= one.limit
        assert is_counted(one) or planned.plan.resident_blocks == planned.workload.layers, planned


def test_a_block_frees_everything():
    log = recorded("a2v", "float16 sums", "exact", 4096, 4, 1000, False)
    numbers = list(zip(log[::2], log[1::2], strict=True))
    assert sorted(n for n, nbytes in numbers if nbytes) == sorted(n for n, nbytes in numbers if not nbytes)


@pytest.mark.parametrize(
    ("expandable", "sizes", "reserved"),
    [
        (False, [1], 2), (False, [2], 20), (False, [9, 9], 20), (False, [9, 9, 9], 40), (False, [10], 10),
        (False, [21], 22), (True, [1], 2), (True, [2], 20), (True, [30], 40), (True, [30, 10], 40),
        (True, [30, 11], 60),
    ],
)  # fmt: skip
def test_segments_have_the_sizes_of_torch(expandable, sizes, reserved):
    allocator = Allocator(1 << 40, expandable)
    for size in sizes:
        allocator.take(size * MIB)
    assert allocator.reserved == allocator.peak == reserved * MIB


@pytest.mark.parametrize(("expandable", "fits"), [(False, False), (True, True)])
def test_only_expandable_segments_join_what_lies_apart(expandable, fits):
    """800 of 1000 MiB are free, but the rest lies in their midst."""
    allocator = Allocator(1000 * MIB, expandable)
    whole = allocator.take(1000 * MIB)
    allocator.give(whole)
    first, _ = allocator.take(400 * MIB), allocator.take(200 * MIB)
    allocator.give(first)
    if fits:
        allocator.take(800 * MIB)
    else:
        with pytest.raises(OutOfMemory):
            allocator.take(800 * MIB)


def test_neighbours_are_joined_and_the_smallest_fitting_block_is_taken():
    allocator = Allocator(300 * MIB, False)
    parts = [allocator.take(100 * MIB) for _ in range(2)]
    allocator.give(parts[0])
    small = [allocator.take(40 * MIB), allocator.take(30 * MIB), allocator.take(30 * MIB)]
    assert allocator.reserved == 200 * MIB
    allocator.give(small[0])
    allocator.give(small[2])
    assert allocator.take(30 * MIB) is small[2]
    allocator.give(small[1])
    allocator.take(70 * MIB)  # the first two, joined
    assert allocator.reserved == 200 * MIB
