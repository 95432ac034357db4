"""Plans: monotone, within their limits, and in step with what the code allocates."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import clip_of

from skyrun.planning.what_if import request_workload
from skyrun.presets import Hardware, Workload, choose, probe
from skyrun.presets.alternatives import largest_size, most_frames
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import stated
from skyrun.presets.memory import PROCESS_BYTES, vae_memory_bytes
from skyrun.presets.plan import GIB
from skyrun.presets.timing import block_weights, step_operations

REAL = Workload(
    task="r2v",
    height=720,
    width=1280,
    frames=121,
    latent_frames=35,
    steps=8,
    layers=40,
    dim=5120,
    ffn_dim=13824,
    weight_type="Q4_K",
    block_bytes=373_000_000,
    outer_bytes=400_000_000,
    text_layers=24,
    text_dim=4096,
    text_block_bytes=200_000_000,
    vae_base_dim=96,
    vae_weights=127_000_000,
)


def card(vram, ram=32.0):
    return Hardware("cuda", "a card", int(vram * GIB), int(vram * GIB), int(ram * GIB), int(ram * GIB))


def cpu(ram):
    return Hardware("cpu", "a CPU", 0, 0, int(ram * GIB), int(ram * GIB))


def pixels_at_a_time(plan):
    sizes = [vae.tile or (REAL.height, REAL.width) for vae in (plan.encoding, plan.decoding)]
    return [height * width for height, width in sizes]


def test_tokens_are_those_of_the_real_model():
    assert REAL.tokens == 126_000


@given(st.floats(1, 200), st.floats(1, 200), st.floats(0.5, 200), st.integers(2, 40))
def test_more_memory_never_makes_a_worse_plan(less, more, limit, frames):
    less, more = sorted((less, more))
    work = dataclasses.replace(REAL, latent_frames=frames)
    small, large = choose(card(less), work, max_vram=limit), choose(card(more), work, max_vram=limit)
    assert not (large.problem and not small.problem)
    assert small.problem or large.step_seconds <= small.step_seconds * (1 + 1e-9)
    assert all(a >= b for a, b in zip(pixels_at_a_time(large), pixels_at_a_time(small), strict=True))
    for more_room, less_room in ((large.encoding, small.encoding), (large.decoding, small.decoding)):
        assert more_room.dtype != less_room.dtype or more_room.parked_bytes <= less_room.parked_bytes
        assert not (less_room.dtype == "float32" != more_room.dtype)
    for plan in (small, large):
        if not plan.problem:
            assert plan.peak_bytes <= plan.limit_bytes
            assert plan.peak_bytes <= limit * GIB


def test_what_a_workload_has_beside_the_usual_is_counted():
    more = dataclasses.replace(REAL, token_matrices=2, context_matrices=1)
    square = REAL.dim**2
    assert block_weights(more) - block_weights(REAL) == 3 * square
    assert step_operations(more)[0] - step_operations(REAL)[0] == 40 * 2 * REAL.tokens * 2 * square


def test_smaller_clips_that_are_suggested_are_those_of_the_workload():
    def is_short(work):
        return work.frames < 100 or work.height < 720

    assert (largest_size(REAL, is_short), most_frames(REAL, is_short)) == ("540P", 97)
    other = dataclasses.replace(REAL, areas=(("480P", 480 * 848),), windowed=True)
    assert (largest_size(other, is_short), most_frames(other, is_short)) == ("480P", 0)


@given(st.floats(0.1, 100), st.floats(0.1, 100))
def test_limits_hold_on_a_cpu(ram, limit):
    plan = choose(cpu(ram), REAL, max_ram=limit)
    assert bool(plan.problem) == (plan.peak_bytes > min(ram, limit) * GIB) or abs(plan.peak_bytes - limit * GIB) < 2


def test_eight_gib_are_enough_for_five_seconds_at_720p():
    assert not choose(card(80), REAL, max_vram=8).problem


def test_a_card_that_holds_everything_keeps_everything():
    assert choose(card(140), REAL).resident_blocks == REAL.layers


def test_dtype_follows_the_card_unless_it_is_given():
    assert choose(card(80), REAL).dtype == "bfloat16"
    assert choose(dataclasses.replace(card(80), bfloat16=False), REAL).dtype == "float16"
    assert choose(cpu(64), REAL).dtype == "float32"
    assert choose(card(80), REAL, dtype="float32").dtype == "float32"


@pytest.mark.parametrize(
    ("type", "gain", "asked", "precision"),
    [
        ("Q4_K", 2.0, None, "fast"),
        ("Q6_K", 1.1, None, "fast"),
        ("Q4_K", 1.05, None, "exact"),
        ("Q4_K", 0.0, None, "exact"),
        ("Q8_0", 2.0, None, "exact"),
        ("BF16", 2.0, None, "exact"),
        ("Q8_0", 0.0, "fast", "fast"),
        ("Q2_K", 3.0, "exact", "exact"),
    ],
)
def test_int8_is_for_small_types_on_cards_that_gain_by_it(type, gain, asked, precision):
    hardware = dataclasses.replace(card(24), fast_gain=gain)
    work = dataclasses.replace(REAL, weight_type=type)
    assert choose(hardware, work, precision=asked).precision == precision


@pytest.mark.parametrize(
    ("vram", "encoding", "decoding"),  # the tile, and whether a part of what is remembered waits on the host
    [
        (80, (None, False), (None, False)),
        (24, (None, False), (None, False)),
        (16, ((360, 1280), False), (None, False)),
        (12, ((180, 1280), False), (None, False)),
        (8, ((90, 1280), True), ((180, 1280), False)),
        (4, ((90, 1280), True), ((90, 1280), True)),
    ],
)
def test_the_autoencoder_works_in_the_memory_there_is(vram, encoding, decoding):
    plan = choose(card(80), REAL, max_vram=vram)
    images, decode = (next(stage for stage in plan.stages if stage.name == name) for name in ("images", "decode"))
    assert (plan.encoding.tile, plan.encoding.room is not None) == encoding
    assert (plan.decoding.tile, plan.decoding.room is not None) == decoding
    assert max(decode.device_bytes, images.device_bytes) <= vram * GIB
    for way, how, stage in (("encode", plan.encoding, images), ("decode", plan.decoding, decode)):
        assert how.parked_bytes == (0 if how.room is None else vae_memory_bytes(REAL, way, how.dtype) - how.room)
        assert stage.host_bytes == PROCESS_BYTES + how.host_bytes
        assert (how.host_bytes > how.parked_bytes) == bool(how.parked_bytes)  # buffers on the way


def test_what_does_not_fit_in_float32_is_encoded_in_16_bits():
    kinds = [choose(card(80), REAL, max_vram=vram).encoding.dtype for vram in (4, 6)]
    assert kinds == ["bfloat16", "float32"]


def test_images_are_encoded_on_whole_frames_and_leave_nothing():
    plan = choose(card(80), dataclasses.replace(REAL, stills=True), max_vram=8)
    assert plan.encoding.tile is None and plan.encoding.room is None
    videos = choose(card(80), REAL, max_vram=8)
    several, stills = (next(one for one in each.stages if one.name == "images") for each in (videos, plan))
    assert several.device_bytes > 1.3 * stills.device_bytes


@pytest.mark.parametrize(
    ("machine", "dtype", "expected"),
    [
        (card(24), None, ("float32", "bfloat16")),
        (dataclasses.replace(card(24), bfloat16=False), None, ("float32", "float32")),
        (card(24), "float16", ("float32", "bfloat16")),
        (card(24), "float32", ("float32", "float32")),
        (cpu(64), None, ("float32", "float32")),
        (cpu(64), "bfloat16", ("float32", "float32")),
    ],
)
def test_the_autoencoder_encodes_in_float32_and_decodes_in_bfloat16_on_cards(machine, dtype, expected):
    plan = choose(machine, REAL, dtype=dtype)
    assert (plan.encoding.dtype, plan.decoding.dtype) == expected


def test_too_little_ram_beside_a_card_is_said():
    assert "of RAM" in choose(card(80, ram=0.5), REAL).problem


def test_a_plan_is_plain_data():
    plan = choose(card(24), REAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.dtype = "float32"
    assert json.loads(json.dumps(plan.as_json()))["resident_blocks"] == plan.resident_blocks


def test_probe_finds_this_machine():
    hardware = probe("cpu")
    assert 0 < hardware.ram_free <= hardware.ram_total


@pytest.mark.parametrize(
    ("card", "asked", "attention"),
    [
        ("RTX 4090", {}, "full-int8"),
        ("RTX 4090", {"prefer": "speed"}, "full-int8"),
        ("RTX 4090", {"prefer": "quality"}, "int8"),
        ("RTX 4090", {"attention": "fp8"}, "fp8"),
        ("RTX 3090", {}, "int8"),
        ("RTX 3090", {"attention": "full-int8"}, "full-int8"),
        ("RTX 5090", {}, "int8"),
        ("RTX 4090", {"precision": "exact"}, "exact"),
        ("RTX 4090", {"precision": "exact", "attention": "int8"}, "int8"),
        ("RTX 4090", {"precision": "fast", "attention": "exact"}, "exact"),
        ("RTX 2080 Ti", {}, "exact"),
        ("H100", {}, "exact"),
    ],
)
def test_attention_is_as_quick_as_its_error_allows(card, asked, attention):
    plan = choose(stated(find_card(card), 64, 2), request_workload(clip_of("r2v", quant="Q8_0")), **asked)
    assert plan.attention == attention
