"""What is found out about the machine, and kept."""

import json
from pathlib import Path

import pytest
from plans import clip_of, plan_clip

from skyrun.cli import main
from skyrun.engine.run import Forecast
from skyrun.events import Progress, StageStarted
from skyrun.kernels.machine.cache import MeasuredFile
from skyrun.planning.hardware import Tuned, disk_number, load_tuned, save_tuned, this_machine
from skyrun.presets import probe
from skyrun.presets.machine import host
from skyrun.presets.machine.cards import CARDS, Rates
from skyrun.presets.machine.hardware import unknown_card
from skyrun.presets.machine.named import PRESETS, preset, preset_limits

RATES = Rates(1e12, 2e12, 0.0, 0.0, 3e12, 4e9)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path / "cache"))


def test_every_number_says_where_it_comes_from(tmp_path):
    hardware = this_machine("cpu", tmp_path)
    assert 0 < hardware.ram_free <= hardware.ram_total and hardware.disk_free > 0 and hardware.cpu
    assert [hardware.origin(name) for name in ("ram_free", "disk_free", "rates", "disk_rate")] == [
        *("reported", "reported", "assumed", "assumed")
    ]


def test_a_disk_is_measured_where_a_file_is_large_enough(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x")
    with large.open("wb") as file:
        file.truncate(host._LEAST_FILE)
    assert probe("cpu", small).origin("disk_rate") == "assumed"
    assert probe("cpu", large).origin("disk_rate") == "measured"
    assert probe("cpu", large, measure=False).origin("disk_rate") == "assumed"


def test_a_folder_that_is_not_there_yet_has_the_space_of_its_nearest_parent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").symlink_to("nowhere")
    for folder in (tmp_path / "a" / "b" / "c", Path("a/b"), tmp_path / "gone"):
        assert host.nearest_existing(folder).resolve() == tmp_path.resolve()
        assert host.free_space(folder) > 0
        assert probe("cpu", folder / "model.gguf", measure=False).origin("disk_free") == "reported"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("files", "own", "limits"),
    [
        (
            {"memory.max": "1000", "memory.current": "600", "memory.stat": "anon 5\ninactive_file 100"},
            "0::/",
            [(1000, 500)],
        ),
        ({"memory.max": "max", "memory.current": "600"}, "0::/", []),
        ({"a/memory.max": "70", "a/memory.current": "9"}, "0::/a/b", [(70, 9)]),
        (
            {"memory/x/memory.limit_in_bytes": "80", "memory/x/memory.usage_in_bytes": "8"},
            "5:cpu:/y\n4:memory:/x",
            [(80, 8)],
        ),
        ({}, "0::/gone", []),
    ],
)
def test_limits_of_containers(tmp_path, files, own, limits):
    for name, text in files.items():
        path = tmp_path / "group" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert host._container_limits(tmp_path / "group", tmp_path / "own") == limits


def test_a_container_has_less_than_the_machine(monkeypatch):
    monkeypatch.setattr(host, "_container_limits", lambda: [(1 << 30, 1 << 29)])
    assert host.memory() == (1 << 30, 1 << 29)


def test_what_was_tuned_is_used(tmp_path):
    save_tuned("cpu", Tuned(RATES, 0.0, {disk_number(tmp_path): 7e9}))
    hardware = this_machine("cpu", tmp_path)
    assert (hardware.rates, hardware.disk_rate) == (RATES, 7e9)
    assert hardware.origin("rates") == hardware.origin("disk_rate") == "measured"


@pytest.mark.parametrize("damage", ["versions", "cut", "fields", "nothing"])
def test_what_was_tuned_otherwise_counts_for_nothing(damage):
    path = save_tuned("cpu", Tuned(RATES))
    assert load_tuned("cpu") == Tuned(RATES)
    said = json.loads(path.read_text())
    if damage == "versions":
        said["holds_for"]["torch"] = "1.0"
    if damage == "fields":
        del said["rates"]["linear"]
    path.write_text({"cut": "{", "nothing": ""}.get(damage, json.dumps(said)))
    assert load_tuned("cpu") is None
    assert this_machine("cpu").origin("rates") == "assumed"


# fmt: off
@pytest.mark.parametrize(
    "change",
    [
        {"rates": {"linear": -1e12}}, {"rates": {"linear": 0}}, {"rates": {"decode": 0.0}}, 
        {"rates": {"attention": "1"}},
        {"rates": {"convolution": None}}, {"rates": {"fast_linear": -1}}, {"rates": {"more": 1.0}}, {"link_rate": -1},
        {"link_rate": True}, {"link_rate": "fast"}, {"disks": {"7": -5.0}}, {"disks": {"7": 0}}, {"disks": []},
        {"disks": {"7": [1]}}, {"rates": None},
    ],
)
# fmt: on
def test_rates_that_cannot_be_count_for_nothing(change):
    path = save_tuned("cpu", Tuned(RATES, 0.0, {"7": 1e9}))
    said = json.loads(path.read_text())
    for name, value in change.items():
        merged = said[name] | value if isinstance(value, dict) and name == "rates" else value
        said[name] = merged
    held = said.pop("holds_for"), said.pop("checksum")
    MeasuredFile(path.name, held[0], dict).update(lambda before: said)
    assert MeasuredFile(path.name, held[0], dict).load() == said
    assert load_tuned("cpu") is None
    assert this_machine("cpu").rates.linear > 0


def test_tuning_keeps_what_is_known_of_other_disks():
    save_tuned("cpu", Tuned(RATES, 0.0, {"7": 1e9, "8": 1e9}))
    save_tuned("cpu", Tuned(RATES, 0.0, {"8": 2e9}))
    assert load_tuned("cpu").disks == {"7": 1e9, "8": 2e9}


def test_tuning_measures_and_shows_before_and_after(tmp_path, monkeypatch, capsys):
    from skyrun.tools import tune as tuning

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuning, "_DIM", 64)
    monkeypatch.setattr(tuning, "_FFN", 96)
    monkeypatch.setattr(tuning, "_FILE_BYTES", host._LEAST_FILE)
    monkeypatch.setitem(tuning._SIZES, "cpu", tuning._Sizes(8, 8, 8, 1, 4, 8, 8))
    assert main(["tune", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "before" in output and "assumed" in output and "linear layers" in output and "int8" not in output
    assert load_tuned("cpu").rates.linear > 0 and list(tmp_path.glob("skyrun-tune-*")) == []
    assert main(["tune", "--device", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rates"]["linear"]["origin"] == "measured"
    assert main(["plan", "r2v"]) in (0, 3)
    assert "measured" in capsys.readouterr().out


def test_presets_are_plans_for_stated_machines():
    for name in PRESETS:
        for size in ("480P", "720P"):
            if (name, size) != ("6gb", "720P"):
                assert not plan_clip(clip_of("r2v", size), preset(name)).plan.problem
    assert preset("cpu").device == "cpu" and "max_vram" not in preset_limits("cpu")
    assert preset_limits("12gb")["max_vram"] < 12


def test_a_card_in_no_table_is_as_quick_as_its_kind():
    known = next(card for card in CARDS if card.name == "RTX 4090")
    guessed = unknown_card("RTX 4095", (8, 9), 24 << 30, 128)
    assert 0.6 < guessed.rates.linear / known.rates.linear < 1.2


def test_the_second_step_corrects_the_forecast():
    plan = plan_clip(clip_of("r2v"), preset("12gb")).plan
    forecast = Forecast(plan)
    assert forecast.after(StageStarted("denoise", 8, "steps")) is None
    assert forecast.after(Progress("denoise", 1)) is None  # it compiles, and reads from a cold disk
    left = forecast.after(Progress("denoise", 2))
    assert left.planned_step_seconds == plan.step_seconds and left.seconds < plan.seconds


def test_plan_does_not_import_torch(tmp_path):
    import subprocess
    import sys

    code = "import sys; from skyrun.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for options in (["--gpu", "RTX 3060"], [], ["--gpu", "RTX 3060", "--plot", str(tmp_path / "plan.png")]):
        subprocess.run([sys.executable, "-c", code, "plan", "r2v", *options], check=True, capture_output=True)
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--gpu", "RTX 3060"], 0, "Q8_0 in bfloat16"),
        (["--gpu", "RTX 3060", "--quant", "q4_k"], 0, "Q4_K in bfloat16 and int8"),
        (["--gpu", "RTX 3060", "--vram", "4", "--resolution", "720P"], 3, "it will not fit"),
        (["--gpu", "RTX 3066"], 2, "such as RTX 3060"),
        (["--vram", "4"], 2, "--vram says nothing without --gpu"),
        (["--ram", "-1"], 2, "expected a number above 0"),
        (["--seconds", "900"], 2, "expected more than 0 and at most 169"),
        (["--resolution", "999P"], 2, "no resolution"),
        (["--quant", "Q9"], 2, "unknown type"),
        (["--preset", "12gb", "--plot", "plan.jpg"], 2, "does not end in .png"),
        (["--preset", "8gb", "--json"], 0, '"weight_type": "Q8_0"'),
        (["--preset", "8gb", "--ram", "8"], 2, "--preset is a whole machine"),
        (["--model", "nowhere"], 4, "does not exist"),
    ],
)
def test_the_command(options, code, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "r2v", *options]) == code
    output = capsys.readouterr()
    assert text in output.out + output.err


def test_files_are_planned_for_as_a_run_plans_them(converted, tmp_path, capsys):
    from small_run import small_request

    from skyrun.planning.job import prepare
    from skyrun.planning.what_if import request_workload

    for quant in ("Q4_K", "F32"):
        work = request_workload(clip_of("r2v", model=converted(quant)))
        job = prepare(small_request(tmp_path, converted(quant), output=None))
        same = ("layers", "dim", "ffn_dim", "weight_type", "block_bytes", "outer_bytes", "text_layers", "vae_base_dim")
        assert {name: getattr(work, name) for name in same} == {name: getattr(job.workload, name) for name in same}
    assert main(["plan", "r2v", "--model", str(converted("Q4_K")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["weight_type"] == "Q4_K"
