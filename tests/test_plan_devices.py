"""Plans for several devices: whether each reads all weights for itself or a share of them."""

import dataclasses

import pytest
from plans import clip_of
from small_run import small_request

from skyrun.cli.commands.plan import planned_text
from skyrun.planning.job import prepare
from skyrun.planning.what_if import plan_request, request_workload
from skyrun.presets import choose
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import STATED, stated
from skyrun.presets.timing import first_step_time, gathered_bytes, step_time


def planned(card="RTX 4090", resolution="480P", devices=4, ram=16, disk=0.5, link=None, **limits):
    """link: GB/s that a device sends to the others."""
    hardware = stated(find_card(card), ram, disk)
    hardware = hardware if link is None else hardware.knowing(STATED, peer_rate=link * 1e9)
    request = dataclasses.replace(clip_of("r2v", resolution), devices=devices)
    return plan_request(request, hardware, **limits)


CHOICES = [
    ({}, "shared"),  # a slow disk, and too little RAM for the page cache
    ({"ram": 64}, "own"),  # from the page cache
    ({"disk": 14}, "own"),  # hidden behind computing
    ({"disk": 2}, "shared"),
    ({"devices": 2, "max_vram": 8, "ram": 8}, "shared"),
    ({"devices": 2, "max_vram": 8, "ram": 8, "disk": 7}, "own"),
    ({"max_vram": 8, "ram": 8, "link": 11}, "shared"),  # in every step
    ({"max_vram": 8, "ram": 8, "link": 0.02}, "own"),  # it would take longer than reading
    ({"card": "RTX 3060", "resolution": "720P", "devices": 2}, "own"),  # a step of minutes
    ({"card": "RTX 3060", "resolution": "720P", "devices": 2, "disk": 0.05}, "shared"),
    ({"devices": 1, "disk": 0.1}, "own"),  # there is nobody to share with
]


@pytest.mark.parametrize(("machine", "weights"), CHOICES)
def test_shares_are_read_where_that_gains(machine, weights):
    one = planned(**machine)
    assert one.plan.weights == one.as_json()["plan"]["weights"] == weights
    text = planned_text(one)
    assert ("each device reads a share of the weights" in text) == (weights == "shared")
    assert ("each device reads all weights for itself" in text) == (weights == "own" and one.plan.devices > 1)


def test_shares_are_of_one_machine():
    """Each has a disk, and nothing is known of the network."""
    work = dataclasses.replace(request_workload(clip_of("r2v", "480P")), devices=4)
    hardware = stated(find_card("RTX 4090"), 16, 0.5)
    plans = {machines: choose(hardware, dataclasses.replace(work, machines=machines)) for machines in (1, 2, 4)}
    assert [plan.weights for plan in plans.values()] == ["shared", "shared", "own"]
    assert plans[4].first_step_seconds == pytest.approx(plans[1].first_step_seconds, rel=0.01)


@pytest.mark.parametrize(("local", "machines"), [(None, 1), (1, 2), (2, 1)])
def test_the_launcher_says_how_many_machines_there_are(converted, tmp_path, monkeypatch, local, machines):
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    job = prepare(small_request(tmp_path, converted("Q8_0"), devices=2))
    assert (job.workload.machines, job.workload.readers) == (machines, 2 // machines)


@pytest.mark.parametrize("ram", [16, 64])
def test_what_a_device_gets_from_the_disk(ram):
    """All of it where each block is read once: in shares, or into the page cache, where the others find it."""
    hardware, cached = stated(find_card("RTX 4090"), ram, 1e-3), ram == 64
    work = request_workload(dataclasses.replace(clip_of("r2v", "480P"), devices=4))
    whole = work.layers * work.block_bytes / hardware.disk_rate
    steps = {shared: step_time(hardware, work, shared=shared) for shared in (False, True)}
    first = {shared: first_step_time(hardware, work, step, shared) for shared, step in steps.items()}
    assert first[True].seconds == whole and first[False].seconds == (whole if cached else 4 * whole)
    assert cached or (steps[True].seconds, steps[False].seconds) == (whole, 4 * whole)


def test_blocks_that_stay_are_not_sent_again():
    work = request_workload(dataclasses.replace(clip_of("r2v"), devices=4))
    assert gathered_bytes(work, work.layers) == 0
    assert gathered_bytes(work, 10) == 0.75 * 30 * work.block_bytes
    assert gathered_bytes(dataclasses.replace(work, machines=2), 10) == 0.5 * 30 * work.block_bytes
