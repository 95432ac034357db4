"""Times against arithmetic by hand, what bounds them, and what a measured step changes."""

import dataclasses

import pytest
import torch
from moved_bytes import bytes_moved
from plans import clip_of, plan_clip
from torch.utils.flop_counter import FlopCounterMode

from skyrun.planning.what_if import request_workload
from skyrun.presets.machine.cards import Rates, find_card
from skyrun.presets.machine.hardware import stated, stated_cpu
from skyrun.presets.timing import (
    _ELEMENTWISE,
    _QUANTIZING,
    START_SECONDS,
    WRITTEN_PIXELS,
    break_even_tokens,
    corrected,
    step_operations,
    step_time,
    with_tokens,
)

WORK = request_workload(clip_of("r2v", "720P", quant="Q8_0"))
CARD = find_card("RTX 3060")


def machine(**changes):
    rates = Rates(1e13, 1e13, 2e13, 2e13, 1e13, 1e15)
    hardware = dataclasses.replace(stated(CARD, 16, 1.0), rates=rates, link_rate=10e9)
    return dataclasses.replace(hardware, **changes)


def test_operations_are_those_of_the_published_model():
    linear, attention = step_operations(WORK)
    assert linear == pytest.approx(3.01e15, rel=0.02)  # 23.9 GFLOP per token
    assert attention == pytest.approx(13.0e15, rel=0.02)  # 819 kFLOP per pair of tokens


@pytest.mark.parametrize(
    ("changes", "bound"),
    [({}, "compute"), ({"disk_rate": 1e6}, "disk"), ({"link_rate": 1e6}, "link"), ({"device": "cpu"}, "compute")],
)
def test_a_step_takes_the_longest_of_what_it_waits_for(changes, bound):
    hardware = machine(**changes)
    time = step_time(hardware, WORK)
    reading = 40 * WORK.block_bytes
    computing = sum(step_operations(WORK)) / 1e13
    expected = {"compute": computing, "disk": reading / 1e6, "link": reading / 1e6}[bound]
    assert time.bound == bound and time.seconds == pytest.approx(expected, rel=0.01)
    assert time.is_hidden_by(time.compute) == (bound == "compute")
    assert time.hidden == pytest.approx(min(1.0, computing / expected), rel=0.01)


def test_int8_is_quicker_and_kept_blocks_are_not_read():
    hardware = machine()
    assert step_time(hardware, WORK, fast=True, attention="int8").seconds == pytest.approx(
        step_time(hardware, WORK).seconds / 2, rel=0.01
    )
    short = with_tokens(WORK, 10)
    whole, half = (step_time(hardware, short, resident=count).seconds for count in (0, 20))
    assert half == pytest.approx(whole / 2)
    assert step_time(hardware, short, resident=40).bound == "compute"


def test_a_file_that_fits_into_memory_is_read_once():
    short = with_tokens(WORK, 10)
    small, large = (step_time(machine(ram_free=gib << 30), short).seconds for gib in (16, 64))
    assert large == pytest.approx(small / 4)  # 4 GB/s instead of 1


def test_tokens_from_which_reading_is_hidden():
    hardware = machine()
    tokens = break_even_tokens(hardware, WORK, False, "bfloat16")
    for count, hidden in ((tokens - 1, False), (tokens, True)):
        time = step_time(hardware, with_tokens(WORK, count))
        assert (time.seconds <= time.compute) is hidden


def test_a_measured_step_corrects_what_is_to_come():
    plan = plan_clip(clip_of("r2v"), stated(CARD, 16, 0.5)).plan
    twice = corrected(plan, 2 * plan.step_seconds)
    assert twice.step_seconds == 2 * plan.step_seconds
    for before, after in zip(plan.stages, twice.stages, strict=True):
        factor = 2 if before.name in ("denoise", "decode") else 1
        assert after.seconds == pytest.approx(factor * before.seconds)
    assert corrected(plan, plan.step_seconds) == plan


def test_a_step_on_a_small_card_takes_minutes():
    """121 frames on an RTX 3060 take three to four minutes a step, as published."""
    assert 160 < step_time(stated(CARD, 16, 0.5), request_workload(clip_of("r2v"))).seconds < 260


def test_the_autoencoder_counts_as_many_operations(published_vae):
    from skyrun.models.vae import WanVAE
    from skyrun.presets.timing import _DECODE, _ENCODE, _ENCODE_STILL

    vae = WanVAE(published_vae, torch.device("meta"), torch.float32)
    with FlopCounterMode(display=False) as decoding:
        for pixels in vae.decode(torch.empty(16, 6, 60, 106, device="meta")):
            del pixels
    with FlopCounterMode(display=False) as encoding:
        vae.encode(torch.empty(3, 21, 480, 848, device="meta"))
    with FlopCounterMode(display=False) as still:
        vae.encode(torch.empty(3, 1, 480, 848, device="meta"))
    squares = 96**2 * 480 * 848
    assert decoding.get_total_flops() / (21 * squares) == pytest.approx(_DECODE, rel=0.05)
    assert encoding.get_total_flops() / (21 * squares) == pytest.approx(_ENCODE, rel=0.05)
    assert still.get_total_flops() / squares == pytest.approx(_ENCODE_STILL, rel=0.05)


@pytest.mark.parametrize(("prefer", "minutes"), [("balanced", 4.6), ("speed", 4.0)])
def test_four_seconds_at_720p_on_a_large_card(prefer, minutes):
    request = dataclasses.replace(clip_of("r2v", "720P", 4.0), attention="full-int8")
    plan = plan_clip(request, stated(find_card("RTX 4090"), 32, 0.5), prefer).plan
    assert 0.8 < next(stage.seconds for stage in plan.stages if stage.name == "denoise") / 60 / minutes <= 1


@pytest.mark.parametrize("way", ["exact", "float16 sums", "int8"])
def test_passes_between_products_move_as_many_bytes(way):
    plain = sum(bytes_moved(way, "exact").values())
    assert plain == pytest.approx(_ELEMENTWISE[way], rel=0.02)
    for attention, quantizing in _QUANTIZING.items():
        assert sum(bytes_moved(way, attention).values()) - plain == pytest.approx(quantizing, rel=0.02)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_everything_that_a_run_does_is_counted(device):
    hardware = machine() if device == "cuda" else stated_cpu(32, 1.0)
    plan = plan_clip(clip_of("r2v", "720P", quant="Q8_0"), hardware).plan
    seconds = {stage.name: stage.seconds for stage in plan.stages}
    assert list(seconds) == ["start", "text", "images", "load", "denoise", "decode", "write"]
    assert all(taken > 0 for taken in seconds.values()) and plan.seconds == sum(seconds.values())
    assert seconds["load"] == pytest.approx(WORK.outer_bytes / hardware.disk_rate)
    assert seconds["write"] == pytest.approx(121 * 720 * 1280 / WRITTEN_PIXELS)
    assert seconds["start"] == START_SECONDS[device]


def test_the_first_step_reads_every_block_from_the_disk():
    slow = machine(disk_rate=1e7, ram_free=64 << 30)  # afterwards the page cache has the file
    plan = plan_clip(clip_of("r2v", "480P", quant="Q8_0"), slow).plan
    assert plan.first_step_seconds == pytest.approx(40 * WORK.block_bytes / 1e7)
    denoise = next(stage.seconds for stage in plan.stages if stage.name == "denoise")
    assert denoise == pytest.approx(plan.first_step_seconds + 7 * plan.step_seconds)
    assert plan.step_seconds < plan.first_step_seconds / 2
