"""`skyrun bench`: what it measures is all there, right, and printed so that it can be read."""

import dataclasses
import json

import pytest
import torch

from skyrun.cli import main
from skyrun.cli.commands import bench as command
from skyrun.cli.commands.bench import checks_text, measurements_text
from skyrun.errors import SkyrunError
from skyrun.events import Progress, StageEnded, StageStarted
from skyrun.tools.bench import checks, measurement, synthetic_model
from skyrun.tools.bench.checks import Check, check_kernels, relative_error
from skyrun.tools.bench.kernels import (
    DENSITIES,
    WAN_14B,
    Bench,
    attention_ways,
    list_precisions,
    measure_kernels,
    plan_bench,
)
from skyrun.tools.bench.measurement import Clock, Measurement

CPU = torch.device("cpu")
TINY = dataclasses.replace(WAN_14B, dim=256, heads=2, ffn_dim=512)
BENCH = Bench(CPU, ("Q4_K", "Q8_0"), (1, 8), TINY)
TINY_MODEL = {
    "transformer": {"dim": 256, "ffn": 512, "in": 16, "out": 16, "freq": 256, "text": 128},
    "text_encoder": {"dim": 128, "inner": 128, "ffn": 256, "vocab": 256, "buckets": 32, "heads": 2},
    "vae": {"base": 8, "z": 16},
}


@pytest.fixture(scope="module", autouse=True)
def hasty():
    """Figures here need not be precise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "_TARGET", 0.0)
        patch.setattr(measurement, "_LEAST", 1)
        yield


@pytest.fixture(scope="module")
def watched(hasty):
    """The events of measuring, and what it returns."""
    events, generator = [], measure_kernels(BENCH)
    while True:
        try:
            events.append(next(generator))
        except StopIteration as stop:
            return events, stop.value


@pytest.fixture(scope="module")
def measured(watched):
    return watched[1]


def test_every_figure_is_an_event(watched):
    started, *steps, ended = watched[0]
    assert started == StageStarted("measure", BENCH.total, "figures")
    assert steps == [Progress("measure", done) for done in range(1, BENCH.total + 1)]
    assert isinstance(ended, StageEnded) and ended.stage == "measure" and ended.seconds > 0


def test_all_that_was_announced_is_measured(measured):
    assert len(measured) == BENCH.total
    assert all(one.seconds > 0 for one in measured)
    parts = {one.part for one in measured}
    assert parts == {"copy", "decode", "linear", "attention", "block"}
    linear = {(one.what, one.rows, one.way) for one in measured if one.part == "linear"}
    for shape in ("256x256", "512x256", "256x512"):
        for rows in BENCH.rows:
            assert (shape, rows, "resident") in linear
            for type in BENCH.types:
                assert {(f"{type} {shape}", rows, way) for way in ("exact", "fast", "torch decode")} <= linear
    blocks = [(one.what, one.way) for one in measured if one.part == "block"]
    assert blocks == [("float32", "resident"), *((t, way) for t in BENCH.types for way in ("exact", "fast"))]
    lists = [f"{name}, density {share:g}" for name in list_precisions(BENCH) for share in DENSITIES]
    assert [one.way for one in measured if one.part == "attention"] == [*attention_ways(BENCH), *lists]


def test_the_table_says_every_figure(measured):
    text = measurements_text(measured)
    assert len(text.splitlines()) == 8 + 13 + (5 + len(attention_ways(BENCH))) + 6 + 3  # and a line between tables
    assert "Q4_K 512x256" in text and "over resident" in text


def test_what_does_not_fit_is_said(measured):
    without = [dataclasses.replace(one, seconds=None) if one.part == "block" else one for one in measured]
    assert "does not fit" in measurements_text(without)


def test_the_clock_reports_what_does_not_fit():
    def too_large():
        raise torch.OutOfMemoryError

    assert Clock(CPU).seconds(too_large) is None
    assert Clock(CPU).seconds(lambda: None) >= 0


def test_rates():
    values = Measurement("linear", "x", 2, "exact", 0.5, 10**9, 10**12).as_json()
    assert values["gb_per_second"] == 2
    assert values["tflop_per_second"] == 2


def test_all_checks_pass_on_this_machine():
    found = list(check_kernels(dataclasses.replace(BENCH, types=("Q6_K", "Q4_0"))))
    assert not [check for check in found if not check.passed]
    assert "checks passed" in checks_text(found)
    assert len(found) > 12


@pytest.mark.parametrize("name", ["linear", "dequantize"])
def test_a_wrong_kernel_is_found(monkeypatch, name):
    right = getattr(checks, name)
    monkeypatch.setattr(checks, name, lambda *a, **k: right(*a, **k) * 1.05)
    wrong = [check for check in check_kernels(dataclasses.replace(BENCH, types=("Q8_0",))) if not check.passed]
    assert wrong
    assert wrong[0].what in checks_text(wrong)


def test_a_number_that_is_none_is_an_error():
    broken = torch.tensor([1.0, float("nan")])
    assert not Check("x", relative_error(broken, torch.ones(2)), 1.0).passed


def test_the_command_prints_a_result(monkeypatch, capsys):
    monkeypatch.setattr(command, "plan_bench", lambda *_: BENCH)
    assert main(["bench", "kernels", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["measurements"]) == BENCH.total
    assert result["environment"]["torch"] == torch.__version__
    monkeypatch.setattr(command, "check_kernels", lambda _: [Check("decode Q4_K", 1.0, 0.0)])
    assert main(["bench", "kernels", "--device", "cpu"]) == 1
    assert "decode Q4_K" in capsys.readouterr().err


def test_mistakes():
    with pytest.raises(SkyrunError, match="F16 is not a quantized type"):
        plan_bench("cpu", ["F16"], None)
    with pytest.raises(SkyrunError, match="0 rows cannot be measured"):
        plan_bench("cpu", None, [0])
    assert plan_bench("cpu", ["q4_k"], [3]).types == ("Q4_K",)
    assert plan_bench("cpu", None, None).rows == (1, 64)


@pytest.fixture
def tiny_model(monkeypatch, tmp_path):
    monkeypatch.setitem(synthetic_model.MODELS, "r2v-14b", TINY_MODEL)
    monkeypatch.chdir(tmp_path)
    return ["bench", "step", "--device", "cpu", "--size", "32x48", "--frames", "5", "--steps", "3", "--blocks", "2"]


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K"])
def test_a_synthetic_model_runs_and_is_deleted(tiny_model, tmp_path, capsys, quant):
    assert main([*tiny_model, "--quant", quant, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in result["stages"]] == ["text", "images", "load", "denoise", "decode"]
    assert result["streamed"] > 0 and result["resident"] > 0
    assert result["read_rate"] > 0 and result["plain_rate"] > 0
    assert 0 <= result["stalled"] <= 1
    assert list(tmp_path.iterdir()) == []


def test_the_figures_are_printed(tiny_model, capsys):
    """With those of two devices."""
    assert main([*tiny_model, "--devices", "2"]) == 0
    text = capsys.readouterr().out
    assert "streamed" in text and "ratio" in text and "a plain read" in text
    assert "on 2 devices, streamed: " in text and "devices send each other " in text


def test_a_model_has_the_announced_size(tiny_model, tmp_path):
    written = list(synthetic_model.write_model(tmp_path, "r2v-14b", "Q4_K", 2))
    assert sum(written) == synthetic_model.model_bytes("r2v-14b", "Q4_K", 2)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == pytest.approx(sum(written), rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--quant", "BF16"], "not a quantized type"), (["--steps", "1"], "one step"), (["--blocks", "0"], "one block")],
)
def test_step_refuses_what_says_nothing(tiny_model, capsys, arguments, said):
    assert main([*tiny_model, *arguments]) == 2
    assert said in capsys.readouterr().err
