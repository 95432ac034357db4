"""Over all cards, memories, disks, tasks and sizes: plans fit, obey limits, and never get worse with more."""

import dataclasses
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import clip_of, plan_clip

from skyrun.planning.what_if import request_workload
from skyrun.presets import choose
from skyrun.presets.attention import ATTENTION_ERRORS
from skyrun.presets.machine.cards import CARDS, find_card
from skyrun.presets.machine.hardware import stated, stated_cpu
from skyrun.presets.memory import CONTEXT_BYTES, GIB
from skyrun.presets.plan import POOR_TYPES, PREFERENCES


def possible(clip):
    """Whether the task makes clips of this length and size."""
    if clip.task == "a2v":
        return clip.resolution != "540P"
    return clip.task == "r2v" or (2 <= clip.seconds <= 5 if clip.task == "shot" else clip.seconds >= 5)


clips = st.builds(
    clip_of,
    st.sampled_from(["r2v", "v2v", "shot", "a2v"]),
    st.sampled_from(["480P", "540P", "720P"]),
    st.sampled_from([2, 3, 5, 20]),
    st.sampled_from([None, None, "Q8_0", "Q4_K", "BF16"]),
).filter(possible)
cards, ram, disks = st.sampled_from(CARDS), st.sampled_from([8, 12, 16, 24, 32, 64, 128]), st.floats(0.1, 12)
preferences, vrams = st.sampled_from(PREFERENCES), st.sampled_from([3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 80])


def assert_fits(plan, hardware, max_vram=None, max_ram=None):
    """Predicted peaks are within what is free and allowed."""
    if plan.problem:
        return
    free = hardware.vram_free + CONTEXT_BYTES if plan.device == "cuda" else hardware.ram_free
    for stage in plan.stages:
        if plan.device == "cuda":
            assert stage.device_bytes <= min(free, (max_vram or 1e9) * GIB)
        assert stage.host_bytes <= min(hardware.ram_free, (max_ram or 1e9) * GIB)


def assert_no_worse(more, less, prefer):
    """With more of something a plan that fits still does, with as good a file, and not slower for one as good."""
    if less.problem:
        return
    assert not more.problem
    if prefer == "memory":
        if less.weight_type in POOR_TYPES and less.weight_type != more.weight_type:
            return
        assert more.peak_bytes <= less.peak_bytes
        assert more.peak_bytes < less.peak_bytes or more.step_seconds <= less.step_seconds * (1 + 1e-9)
        return
    (before,), (after,) = ([s for s in plan.stages if s.name == "decode"] for plan in (less, more))
    if prefer in ("balanced", "quality"):
        sizes = [size(plan.weight_type) for plan in (less, more)]
        assert sizes[1] >= sizes[0]
        if sizes[1] == sizes[0]:
            assert more.step_seconds <= less.step_seconds * (1 + 1e-9)
    else:
        assert more.step_seconds <= less.step_seconds * 1.03
    if less.decoding.dtype == more.decoding.dtype:
        assert after.seconds <= before.seconds * (1 + 1e-9)


def size(type):
    return request_workload(clip_of("r2v", quant=type)).block_bytes


@given(cards, ram, disks, clips, preferences)
@settings(max_examples=400, deadline=None)
def test_what_is_predicted_fits_into_what_is_free(card, ram, disk, clip, prefer):
    hardware = stated(card, ram, disk)
    assert_fits(plan_clip(clip, hardware, prefer).plan, hardware)


@given(st.sampled_from([8, 16, 32, 128]), disks, clips, preferences)
@settings(max_examples=60, deadline=None)
def test_what_is_predicted_fits_into_memory_without_a_card(ram, disk, clip, prefer):
    hardware = stated_cpu(ram, disk)
    assert_fits(plan_clip(clip, hardware, prefer).plan, hardware)


@given(cards, st.floats(3, 40), st.floats(3, 40), ram, disks, clips, preferences)
@settings(max_examples=400, deadline=None)
def test_more_vram_is_never_worse(card, one, other, ram, disk, clip, prefer):
    less, more = (plan_clip(clip, stated(card, ram, disk, vram), prefer).plan for vram in sorted((one, other)))
    assert_no_worse(more, less, prefer)


@given(cards, st.floats(4, 130), st.floats(4, 130), disks, clips, preferences)
@settings(max_examples=400, deadline=None)
def test_more_ram_is_never_worse(card, one, other, disk, clip, prefer):
    less, more = (plan_clip(clip, stated(card, ram, disk), prefer).plan for ram in sorted((one, other)))
    assert_no_worse(more, less, prefer)


@given(cards, ram, disks, disks, clips, preferences)
@settings(max_examples=400, deadline=None)
def test_a_quicker_disk_is_never_worse(card, ram, one, other, clip, prefer):
    less, more = (plan_clip(clip, stated(card, ram, disk), prefer).plan for disk in sorted((one, other)))
    assert_no_worse(more, less, prefer)


@given(st.floats(4, 130), st.floats(4, 130), disks, disks, clips, preferences)
@settings(max_examples=100, deadline=None)
def test_more_is_never_worse_without_a_card(one, other, slow, quick, clip, prefer):
    slow, quick = sorted((slow, quick))
    less, more = (
        plan_clip(clip, stated_cpu(*pair), prefer).plan for pair in ((min(one, other), slow), (max(one, other), quick))
    )
    assert_no_worse(more, less, prefer)


@given(cards, ram, disks, clips, st.floats(2, 30), st.floats(1, 30), st.sampled_from(["exact", "fast"]), preferences)
@settings(max_examples=100, deadline=None)
def test_what_is_forced_is_obeyed(card, ram, disk, clip, max_vram, max_ram, precision, prefer):
    hardware = stated(card, ram, disk)
    limits = {"max_vram": max_vram, "max_ram": max_ram, "precision": precision, "dtype": "float16"}
    plan = plan_clip(clip, hardware, prefer, **limits).plan
    assert (plan.precision, plan.dtype) == (precision, "float16")
    assert clip.quant in (None, plan.weight_type)
    assert_fits(plan, hardware, max_vram, max_ram)


@given(cards, ram, disks, clips, preferences)
@settings(max_examples=100, deadline=None)
def test_poor_types_are_for_what_else_would_not_fit(card, ram, disk, clip, prefer):
    hardware = stated(card, ram, disk)
    plan = plan_clip(clip, hardware, prefer).plan
    if plan.weight_type in POOR_TYPES and not plan.problem:
        assert plan_clip(dataclasses.replace(clip, quant="Q4_K"), hardware, prefer).plan.problem


@given(cards, disks, clips)
@settings(max_examples=100, deadline=None)
def test_preferences_do_what_they_say(card, disk, clip):
    hardware = stated(card, 32, disk)
    balanced, quality, speed, memory = (plan_clip(clip, hardware, prefer).plan for prefer in PREFERENCES)
    if quality.problem:
        return
    assert ATTENTION_ERRORS[quality.attention] <= ATTENTION_ERRORS[balanced.attention]
    assert size(balanced.weight_type) <= size(quality.weight_type)
    assert balanced.step_seconds <= quality.step_seconds * (1 + 1e-9)
    assert speed.step_seconds <= balanced.step_seconds * 1.03
    assert size(quality.weight_type) >= size(memory.weight_type)
    taken = [next(s.device_bytes for s in plan.stages if s.name == "denoise") for plan in (memory, quality, speed)]
    assert taken[0] == min(taken)


@given(cards, vrams, vrams, ram, disks, clips, preferences)
@settings(max_examples=200, deadline=None)
def test_more_vram_takes_no_longer_or_says_what_for(card, one, other, ram, disk, clip, prefer):
    assert_no_longer(*(stated(card, ram, disk, vram) for vram in sorted((one, other))), clip, prefer)


@given(cards, st.floats(4, 130), st.floats(4, 130), disks, clips, preferences)
@settings(max_examples=100, deadline=None)
def test_more_ram_takes_no_longer_or_says_what_for(card, one, other, disk, clip, prefer):
    assert_no_longer(*(stated(card, ram, disk) for ram in sorted((one, other))), clip, prefer)


def assert_no_longer(less, more, clip, prefer):
    """At most 3 % longer with more memory, or the plan says how to have it sooner, and it is as it says."""
    before, after = (plan_clip(clip, hardware, prefer).plan for hardware in (less, more))
    if before.problem:
        return
    longer = after.seconds > 1.03 * before.seconds or after.step_seconds > 1.03 * before.step_seconds
    option = re.search(r"--(prefer|quant) (\w+) takes (\d+)% less time", " ".join(after.notes))
    assert option or not longer
    assert prefer != "speed" or not longer or before.weight_type in POOR_TYPES
    if option:
        kind, value, percent = option.groups()
        asked = dataclasses.replace(clip, quant=value) if kind == "quant" else clip
        sooner = plan_clip(asked, more, value if kind == "prefer" else prefer).plan
        assert not sooner.problem and f"{1 - sooner.seconds / after.seconds:.0%}" == f"{percent}%"


@pytest.mark.parametrize(
    ("name", "clip", "prefer", "note"),
    [
        ("RTX 3060", clip_of("r2v"), "quality", r"time for quality: --prefer speed takes \d\d% less .* Q6_K .* int8"),
        ("RTX 3060", clip_of("r2v"), "memory", r"time for memory: --prefer speed .* GiB of memory"),
        ("RTX 4090", clip_of("r2v", "480P", 0.05), "speed", r"time for quality: --quant Q3_K .* visible errors"),
    ],
)
def test_a_plan_says_what_it_takes_more_time_for(name, clip, prefer, note):
    (said,) = plan_clip(clip, stated(find_card(name), 16, 0.5), prefer).plan.notes
    assert re.search(note, said)


def test_the_quickest_plan_says_only_what_quality_takes():
    (note,) = plan_clip(clip_of("r2v"), stated(find_card("RTX 3060"), 16, 0.5), "speed").plan.notes
    assert note.startswith("--prefer quality takes ") and "with Q8_0 in bfloat16" in note


def test_days_on_a_cpu_are_said_and_what_to_do():
    plan = plan_clip(clip_of("r2v", "720P"), stated_cpu(32, 0.5)).plan
    note = plan.notes[-1]
    hours = int(re.search(r"about (\d+) hours for this clip", note)[1])
    assert hours == round(plan.seconds / 3600) > 100
    assert "an RTX 3060 would take about " in note and "256x448 with 25 frames would take" in note
    talking = plan_clip(clip_of("a2v"), stated_cpu(32, 0.5)).plan.notes[-1]
    assert "with 125 frames" in talking  # its length is that of the speech


def test_the_quantization_follows_the_disk_and_not_the_card():
    """Five seconds of 720P hide any disk; one frame hides none, but memory that holds the file does."""
    long, short = clip_of("r2v", "720P"), clip_of("r2v", "480P", 0.05)
    for name in ("RTX 3060", "RTX 4070"):
        hardware = stated(find_card(name), 16, 0.5)
        assert plan_clip(long, hardware).plan.weight_type == "Q8_0"
        assert plan_clip(short, hardware).plan.weight_type in ("Q6_K", "Q5_K", "Q4_K")
        assert plan_clip(short, stated(find_card(name), 64, 0.5)).plan.weight_type == "Q8_0"  # read from memory


@pytest.mark.parametrize(("vram", "remedy"), [(4.2, "540P or"), (3.5, "480P would"), (3, "256x448 would")])
def test_what_does_not_fit_says_what_would(vram, remedy):
    hardware = stated(find_card("RTX 3060"), 16, 0.5, vram)
    plan = plan_clip(clip_of("r2v", "720P"), hardware).plan
    assert plan.problem and remedy in plan.remedy and "would fit" in plan.remedy
    if "480P" in plan.remedy:
        assert not plan_clip(clip_of("r2v", "480P"), hardware).plan.problem
    if " frames" not in plan.remedy:
        return
    frames = int(plan.remedy.split(" frames")[0].split()[-1])
    work = request_workload(clip_of("r2v", "720P"))
    for count, problem in ((frames, False), (frames + 4, True)):
        shorter = dataclasses.replace(work, frames=count, latent_frames=5 + (count - 1) // 4)
        assert bool(choose(hardware, shorter).problem) is problem


@pytest.mark.parametrize(
    ("name", "vram", "found"),
    [
        ("NVIDIA GeForce RTX 3060", 12, "RTX 3060"),
        ("nvidia geforce rtx 4070 laptop gpu", 8, "RTX 4070 Laptop"),
        ("RTX 4070 Ti SUPER", None, "RTX 4070 Ti SUPER"),
        ("rtx 4060 ti 16GB", None, "RTX 4060 Ti"),
        ("3090ti", None, "RTX 3090 Ti"),
        ("RTX4070TiSuper", None, "RTX 4070 Ti SUPER"),
        ("NVIDIA H200", 140, "H200"),
        ("NVIDIA H100 80GB HBM3", 79, "H100 80GB HBM3"),
    ],
)
def test_cards_are_found_by_the_names_that_drivers_give(name, vram, found):
    assert find_card(name, vram).name == found


def test_cards_of_one_name_are_told_apart_by_their_memory():
    assert [find_card("RTX 4060 Ti", vram).vram for vram in (7.6, 15.9, None)] == [8, 16, 8]
    assert find_card("RTX 4060 Ti 16GB").vram == 16
    assert find_card("Radeon 9") is None


def test_every_card_is_told_from_every_other():
    for one, other in itertools.combinations(CARDS, 2):
        assert (one.name, one.vram) != (other.name, other.vram)
    for card in CARDS:
        assert find_card(card.name, card.vram) == card
        assert card.float16 <= card.float16_sums <= card.int8
