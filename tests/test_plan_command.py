"""What `skyrun plan` takes and says."""

import dataclasses
import json
import re

import pytest

from skyrun.cli import main
from skyrun.cli.commands.plan import planned_text
from skyrun.errors import SkyrunError
from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request
from skyrun.presets.machine.card import link_rate
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import STATED, stated

SAYS = [
    (["r2v", "--gpu", "RTX 3060", "--size", "480x832", "--steps", "6", "--frames", "81"], "480x832 .* 81 .* 6 steps"),
    (["r2v", "--gpu", "RTX 3060", "--width", "832", "--height", "480"], "480x832"),
    (["r2v", "--gpu", "RTX 3060"], "Q8_0 in bfloat16 and int8 attention, sparse at 1 %, a file of 15.4 GB;"),
    (["a2v", "--gpu", "RTX 3060"], "a file of 20.4 GB"),
    (
        ["r2v", "--gpu", "RTX 3060", "--quant", "Q4_K", "--attention", "int8"],
        "Q4_K in bfloat16 and int8, a file of 8.4 GB",
    ),
    (["r2v", "--gpu", "RTX 4090", "--seconds", "10"], "not made for 10.0 s at once"),
    (["r2v", "--like", "RTX 3090", "--vram", "48"], "a card like RTX 3090, 48 GB"),
    (["r2v", "--gpu", "RTX 4090 24 GB"], "RTX 4090 24 GB"),
    (["r2v", "--gpu", "list"], "RTX 3060 .* 12 GB"),
    (["--gpu", "list"], "RTX 3060 .* 12 GB"),
    (["r2v", "--gpu", "RTX 3060", "--prefer", "memory"], "all blocks are streamed from disk"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), SAYS)
def test_what_a_plan_says(arguments, said, capsys):
    assert main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(said, out), out


MISTAKES = [
    ([], "say which task to plan for"),
    (["r2v", "--size", "big"], "size 'big' is not HxW"),
    (["r2v", "--size", "100x200"], "is not on the grid of 16 pixels"),
    (["r2v", "--steps", "0"], "got 0 steps"),
    (["r2v", "--frames", "10"], "10 frames are not 4 k + 1"),
    (["r2v", "--guidance", "5"], "r2v has no --guidance: its model is distilled"),
    (["t2v", "--guidance", "0.5"], "--guidance 0.5 is not a scale"),
    (["a2v", "--nag", "1"], "--nag 1 is not a scale"),
    (["r2v", "--gpu", "RX 7900 XTX"], "is made by AMD"),
    (["r2v", "--gpu", "RTX 3060", "--like", "RTX 3090"], "--gpu and --like both name a card"),
    (["r2v", "--like", "RTX 3090"], "--like needs --vram"),
    (["r2v", "--gpu", ""], "--gpu list lists them"),
    (["r2v", "--vram", "8"], "--vram says nothing without --gpu or --like"),
    (["r2v", "--preset", "8gb", "--like", "RTX 3090"], "--preset is a whole machine"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_what_cannot_be_planned(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "is not here" not in said  # what is missing is said of plans, not beside mistakes


@pytest.mark.parametrize("model", ["wan2.1-t2v-1.3b", "city96/Wan2.1-T2V-14B-gguf:Q8_0"])
def test_a_plan_is_that_of_the_model_that_is_named(model, capsys):
    assert main(["plan", "t2v", "--model", model, "--gpu", "RTX 4090"]) == 0
    assert "480x832 (height x width), 81 frames, 50 steps" in capsys.readouterr().out


def test_the_sizes_of_the_files_are_values_too(capsys):
    assert main(["plan", "a2v", "--gpu", "RTX 3060", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = {"text encoder": 6.04, "autoencoder": 0.508, "image encoder": 0.675, "audio encoder": 0.377}
    assert said["model_bytes"].pop("transformer") == said["transformer_bytes"]
    assert {role: nbytes / 1e9 for role, nbytes in said["model_bytes"].items()} == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "parts", "sources"),
    [
        (
            ["r2v"],
            "transformer 15.4 GB, text encoder 6.0 GB, autoencoder 507.6 MB: 22.0 GB in all",
            "Skywork/SkyReels-V3-",
        ),
        (["i2v", "--model", "wan2.1-i2v-480p:Q4_K"], "image encoder 675.4 MB: 16.8 GB in all", "city96/Wan2.1-I2V-14B"),
        (["i2v", "--model", "df-1.3b:Q8_0"], "autoencoder 507.6 MB: 8.1 GB in all", "Skywork/SkyReels-V2-DF-1.3B"),
    ],
)
def test_what_would_be_fetched_counts_every_part(arguments, parts, sources, capsys):
    assert main(["plan", *arguments]) == 0
    said = capsys.readouterr().err
    assert "is not here" in said and parts in said and sources in said


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_share_time_and_memory(devices, lanes):
    """On the usual card, over PCIe 4 of both widths; memory where plans are made for the least of it."""
    hardware = stated(find_card("RTX 3060"), 32, 2.0).linked(STATED, link_rate(4, lanes))
    request = Request("r2v", "", resolution="720P", devices=devices, attention="int8")
    planned = plan_request(request, hardware)
    assert not planned.plan.problem
    assert planned.plan.seconds <= (0.6 if devices == 2 else 0.35) * planned.alone.seconds
    least = plan_request(dataclasses.replace(planned.request, prefer="memory"), hardware)
    assert least.plan.peak_bytes < least.alone.peak_bytes
    text = planned_text(planned)
    assert f"{devices} x RTX 3060" in text and f"{devices} devices take " in text
    assert planned.as_json()["one_device"]["devices"] == 1


def test_devices_that_do_not_divide_the_heads():
    with pytest.raises(SkyrunError, match="40 heads of attention cannot be divided among 3 devices") as caught:
        plan_request(Request("r2v", "", devices=3), stated(find_card("RTX 3060"), 32, 2.0))
    assert caught.value.hint == "with this model --devices can be 1, 2, 4, 5, 8, 10, 20 or 40"
