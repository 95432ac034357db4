"""A plan says every number that its times rest on, where each comes from, and what another preference would gain."""

import dataclasses

import pytest
from plans import clip_of, plan_clip

from skyrun.planning.what_if import described_hardware, plan_request
from skyrun.presets.machine.hardware import MEASURED, REPORTED, stated_cpu

CARD = described_hardware("RTX 4090", ram=64, disk=2.0)
CLIP = clip_of("r2v", "720P", 4.0)


def said(hardware=CARD, prefer="quality", **changes):
    planned = plan_request(dataclasses.replace(CLIP, prefer=prefer, **changes), hardware)
    return "\n".join(planned.assumptions), planned


@pytest.mark.parametrize("prefer", ["quality", "speed"])
@pytest.mark.parametrize(
    "field", ["linear", "attention", "fast_linear", "int8_attention", "convolution", "decode", "float32"]
)
def test_a_rate_that_changes_the_time_is_said(prefer, field):
    """And none that does not."""
    text, planned = said(prefer=prefer)
    how = {"precision": planned.plan.precision, "attention": planned.plan.attention, "quant": planned.plan.weight_type}
    rates = dataclasses.replace(CARD.rates, **{field: getattr(CARD.rates, field) * 0.5})
    slower, again = said(dataclasses.replace(CARD, rates=rates), prefer, **how)
    assert (again.plan.seconds > planned.plan.seconds) is (slower != text)


@pytest.mark.parametrize("field", ["disk_rate", "link_rate"])
def test_disk_and_link_are_said_with_their_origin(field):
    text, _ = said(CARD.knowing(MEASURED, **{field: 1.5e9 if field == "disk_rate" else 15e9}))
    assert ("1.50 GB/s (measured)" if field == "disk_rate" else "15 GB/s (measured)") in text


def test_what_is_measured_and_reported_is_not_assumed():
    known = CARD.knowing(MEASURED, rates=CARD.rates).knowing(REPORTED, ram_free=20 << 30, vram_free=23 << 30)
    text, _ = said(known)
    assert "rates (measured)" in text and "desktop" not in text
    assert "rates (from the table of cards)" in said()[0] and "a desktop takes 0.8 GiB of VRAM and 3 GiB" in said()[0]


def test_whether_the_page_cache_has_the_file_is_said():
    assert "comes from the page cache" in said()[0]
    assert "is read anew for each step" in said(described_hardware("RTX 4090", ram=16))[0]


def test_a_cpu_has_no_link_and_no_kernels():
    text, _ = said(stated_cpu(64, 1.0))
    assert "link" not in text and "kernels" not in text and "VRAM" not in text and "number of cores" in text


def test_each_preference_says_what_the_other_is_worth():
    quality, speed = (plan_clip(CLIP, CARD, prefer).plan for prefer in ("quality", "speed"))
    (gain,), (cost,) = quality.notes, speed.notes
    assert f"--prefer speed takes {1 - speed.seconds / quality.seconds:.0%} less time" in gain
    assert f"--prefer quality takes {quality.seconds / speed.seconds - 1:.0%} more time" in cost
    assert speed.weight_type in gain and quality.weight_type in cost


def test_nothing_is_said_where_both_are_the_same():
    only = dataclasses.replace(CLIP, quant="Q8_0", precision="exact", attention="exact")
    small = plan_clip(only, described_hardware("RTX 3060", ram=16), "speed")
    assert small.plan.decoding.dtype == "bfloat16" and not small.plan.notes
