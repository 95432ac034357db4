"""The command line: what a user types wrong, what machines read, and how fast it answers."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from skyrun import SkyrunError
from skyrun.cli import main
from skyrun.errors import BAD_INPUT, INTERRUPTED

ROOT = Path(__file__).parent.parent
PICTURE = "{picture}"
MODEL = "{model}"
GOOD = ["run", "r2v", "-p", "a sea", "--image", PICTURE, "--model", MODEL, "--device", "cpu"]
SMALL = ["--size", "32x48", "--frames", "5", "--seed", "1"]


@pytest.fixture
def places(tmp_path, converted, checkpoint):
    """What arguments can name."""
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "picture.png")
    names = {"picture": tmp_path / "picture.png", "model": converted("Q8_0"), "checkpoint": checkpoint}
    return {name: str(path) for name, path in names.items()} | {"out": str(tmp_path / "out.mp4")}


def filled(arguments, places):
    return [argument.format(**places) for argument in arguments]


@pytest.mark.parametrize("arguments", [["fly"], ["run", "fly"], ["run", "r2v", "-p", "x", "--frames", "x"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: skyrun" in capsys.readouterr().err


def test_skyrun_alone_prints_the_help(capsys):
    assert main([]) == 0
    assert "make a clip" in capsys.readouterr().out


def test_an_error_can_be_read_by_machines(places, capsys):
    assert main([*filled(GOOD, places), "--frames", "2", "--json"]) == BAD_INPUT
    error = json.loads(capsys.readouterr().out)
    assert error["event"] == "error"
    assert "2 frames" in error["message"]
    assert error["code"] == BAD_INPUT


def test_cuda_without_a_gpu_says_what_is_wrong(places, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*filled(GOOD[:-1], places), "cuda"]) == BAD_INPUT
    assert "--device cuda" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_writes_nothing(places, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert main([*filled(GOOD, places), *SMALL, "--dry-run", "--json"]) == 0
    output = capsys.readouterr()
    plan = json.loads(output.out)
    assert plan["size"] == [32, 48]
    assert plan["plan"]["dtype"] == "float32"
    assert plan["model"]["type"] == "Q8_0"
    assert [stage["name"] for stage in plan["plan"]["stages"]] == ["text", "images", "denoise", "decode"]
    assert "streamed from disk" in output.err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_size_follows_the_first_picture(places, capsys):
    assert main([*filled(GOOD, places), "--resolution", "540P", "--seconds", "2", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["size"] == [576, 864]
    assert plan["frames"] == 49


NOTES = [
    (["--size", "64x32"], "the clip is high, 64 high and 32 wide, but what it is made from is wide"),
    (["--width", "32", "--height", "64"], "--size 32x64 would be wide"),
    (["--size", "32x64"], ""),
    (["--size", "32x48", "--seconds", "8"], "the model was not made for 8.0 s at once"),
    (["--size", "32x48", "--seconds", "5"], ""),
]


@pytest.mark.parametrize(("options", "note"), NOTES)
def test_what_a_person_should_know_is_said(places, capsys, options, note):
    assert main([*filled(GOOD, places), *options, "--dry-run", "--json"]) == 0
    out = capsys.readouterr()
    assert note in out.err and bool(note) is any(word in out.err for word in ("but what it is", "was not made"))
    (plan,) = [json.loads(line) for line in out.out.splitlines()]
    assert any(note in notice for notice in plan["notices"]) or not note


def test_of_several_transformers_the_best_or_the_one_named(places, converted, tmp_path, capsys):
    both = tmp_path / "both"
    both.mkdir()
    for quant in ("Q8_0", "Q4_K"):
        for path in converted(quant).iterdir():
            (both / path.name).write_bytes(path.read_bytes())
    arguments = filled([*GOOD[:7], str(both), *SMALL, "--dry-run", "--json"], places)
    for extra, expected in (([], "Q8_0"), (["--quant", "Q4_K"], "Q4_K")):
        assert main([*arguments, *extra]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["type"] == expected


def test_without_a_name_the_clip_gets_a_free_one(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("r2v-1.mp4", "r2v-1-1.mp4"):
        assert main([*filled(GOOD, places), *SMALL, "--steps", "1"]) == 0
        assert (tmp_path / expected).is_file()


def test_a_clip_that_was_there_survives_a_failure(places, tmp_path, monkeypatch):
    import skyrun.pipelines.reference as pipeline

    def fail(*_):
        raise SkyrunError("the disk went away", "plug it in", 1)
        yield

    monkeypatch.setattr(pipeline, "decode", fail)
    (tmp_path / "out.mp4").write_text("the old clip")
    assert main([*filled(GOOD, places), *SMALL, "-o", places["out"], "--overwrite"]) == 1
    assert (tmp_path / "out.mp4").read_text() == "the old clip"
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("what", ["clip", "latents", "conversion", "demo"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(places, tmp_path, what):
    """A limit on the size of files stands in for the full disk: writes fail half-way in both."""
    import resource

    arguments, limit = {
        "clip": ([*GOOD, "--size", "256x384", "--frames", "5", "--steps", "1", "-o", "{out}"], 20_000),
        "latents": ([*GOOD, *SMALL, "-o", "{out}", "--save-latents", str(tmp_path / "latents")], 2_000),
        "conversion": (["convert", "{checkpoint}", "-o", str(tmp_path / "model")], 1_000_000),
        "demo": (["demo", "-o", str(tmp_path / "demo.mp4")], 1_000),
    }[what]
    done = subprocess.run(
        [sys.executable, "-m", "skyrun", *filled(arguments, places)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert "error: cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "latents").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


def test_files_have_the_users_permissions(places, tmp_path, converted):
    latents = tmp_path / "latents.safetensors"
    outputs = ["-o", places["out"], "--save-latents", str(latents)]
    assert main([*filled(GOOD, places), *SMALL, "--steps", "1", *outputs]) == 0
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    assert all(path.stat().st_mode == usual for path in (latents, tmp_path / "out.mp4", *converted("Q8_0").iterdir()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_leaves_nothing_half_written(places, tmp_path, number):
    command = [sys.executable, "-m", "skyrun", *filled(GOOD, places), "--size", "256x256", "--frames", "81", "--json"]
    command += ["--seed", "1", "-o", places["out"]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        if json.loads(line)["event"] == "block_done":
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert not list(tmp_path.glob("*.mp4"))
    assert not list(tmp_path.glob(".*partial"))


def test_info_of_each_kind_of_file(places, converted, capsys):
    assert main([*filled(GOOD, places), *SMALL, "-o", places["out"]]) == 0
    capsys.readouterr()
    assert main(["info", places["out"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["made_from"]["prompt"] == "a sea"
    for path in converted("Q8_0").iterdir():
        assert main(["info", str(path), "--json"]) == 0
        description = json.loads(capsys.readouterr().out)
        assert sum(type["bytes"] for type in description["types"].values()) <= description["bytes"]
        assert main(["info", str(path)]) == 0
        assert "weights" in capsys.readouterr().out


def test_info_of_a_damaged_safetensors_file(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    deep = b"[" * 200_000
    hostile = len(deep).to_bytes(8, "little") + deep
    entry = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    extra = len(entry).to_bytes(8, "little") + entry + bytes(5)
    lengths = [(n).to_bytes(8, "little") for n in (1 << 62, 4, 5)]
    for content in (b"", bytes(4), lengths[0], lengths[1] + b"[1] ", lengths[2] + b'{"a":', hostile, extra):
        path.write_bytes(content)
        assert main(["info", str(path)]) == BAD_INPUT
        assert "is not a usable safetensors file" in capsys.readouterr().err


def test_doctor_gives_verdicts(capsys):
    main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["subject"] for finding in findings] == [
        *("Python", "torch", "GPU", "kernels", "convolution", "system", "RAM", "models", "disk", "tuning", "cache")
    ]
    assert all(finding["verdict"] in ("good", "unknown", "slow", "fails") for finding in findings)
    assert all(finding["remedy"] for finding in findings if finding["verdict"] != "good")
    main(["doctor"])
    assert "Python: 3." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["info", "{gguf}"], ["info", "{vae}"], ["doctor"]]
)
def test_quick_commands_do_not_import_torch(arguments, converted):
    files = {"gguf": next(converted("Q8_0").glob("*.gguf")), "vae": next(converted("Q8_0").glob("*.safetensors"))}
    code = "import sys\nfrom skyrun.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, *(argument.format(**files) for argument in arguments)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
