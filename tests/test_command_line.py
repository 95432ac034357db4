"""The command line: what a user types wrong, what machines read, and how fast it answers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from skyrun import SkyrunError
from skyrun.cli import main
from skyrun.errors import BAD_INPUT, INTERRUPTED, MODEL_MISSING, WILL_NOT_FIT

ROOT = Path(__file__).parent.parent
PICTURE = "{picture}"
MODEL = "{model}"
GOOD = ["run", "r2v", "-p", "a sea", "--image", PICTURE, "--model", MODEL, "--device", "cpu"]
SMALL = ["--size", "32x48", "--frames", "5", "--seed", "1"]


def damaged(pattern, change):
    """A copy of a model in which the bytes of one file are changed."""

    def make(folder, model):
        shutil.copytree(model, folder)
        (path,) = folder.glob(pattern)
        path.write_bytes(change(path.read_bytes()))
        return folder

    return make


def without(name):
    """Change safetensors bytes so that a tensor has another name."""
    return lambda content: content.replace(f'"{name}"'.encode(), f'"{name[:-1]}_"'.encode(), 1)


BAD_MODELS = {
    "cut": damaged("SkyReels*", lambda content: content[: len(content) // 2]),
    "foreign": damaged("SkyReels*", lambda content: content.replace(b"r2v", b"a2v", 1)),
    "liar": damaged(
        "SkyReels*", lambda content: content.replace(b"skyrun.layers\x04\0\0\0\x02", b"skyrun.layers\x04\0\0\0\x09", 1)
    ),
    "headless": damaged("SkyReels*", lambda content: content.replace(b"head.head.bias", b"head.head.bios", 1)),
    "cut_vae": damaged("*.safetensors", lambda content: content[:-1]),
    "hole_in_vae": damaged("*.safetensors", without("decoder.middle.1.proj.weight")),
    "hole_in_text": damaged("umt5*", lambda content: content.replace(b"blk.1.ffn_down", b"blk.1.ffn_dawn", 1)),
    "no_tokenizer": damaged(
        "umt5*", lambda content: content.replace(b"tokenizer.huggingface", b"tokenizer.hugginghand", 1)
    ),
}


@pytest.fixture
def places(tmp_path, converted, checkpoint):
    """Good and bad files that arguments can name."""
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "picture.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "holes").mkdir()
    shutil.copytree(checkpoint, tmp_path / "holes", dirs_exist_ok=True)
    shard = next((tmp_path / "holes" / "transformer").glob("*00002.safetensors"))
    tensors = load_file(shard)
    del tensors["blocks.1.attn1.to_q.weight"]
    save_file(tensors | {"proj_out.bias": torch.zeros(3)}, shard)
    folders = {name: str(make(tmp_path / name, converted("Q8_0"))) for name, make in BAD_MODELS.items()}
    names = {"picture": "picture.png", "text": "text.png", "empty": "empty", "holes": "holes"}
    found = {name: str(tmp_path / path) for name, path in names.items()}
    return (
        found
        | folders
        | {"model": str(converted("Q8_0")), "checkpoint": str(checkpoint), "out": str(tmp_path / "out.mp4")}
    )


def filled(arguments, places):
    return [argument.format(**places) for argument in arguments]


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        ([*GOOD[:5], "none.png"], BAD_INPUT, "none.png does not exist", "run --help"),
        ([*GOOD[:5], "{text}", *GOOD[6:]], BAD_INPUT, "text.png is not a readable picture", "PNG, JPEG or WebP"),
        ([*GOOD[:5], *[PICTURE] * 5], BAD_INPUT, "got 5 reference images, expected 1 to 4", "run --help"),
        (["run", "r2v", "-p", "x"], BAD_INPUT, "got 0 reference images, expected 1 to 4", "run --help"),
        ([*GOOD[:3], "  ", *GOOD[4:]], BAD_INPUT, "the prompt is empty", "run --help"),
        ([*GOOD, "--size", "100x200"], BAD_INPUT, "size 100x200 is not on the grid of 16 pixels; .* 96x192", ""),
        ([*GOOD, "--size", "big"], BAD_INPUT, "size 'big' is not HxW", "--size 480x832"),
        ([*GOOD, "--resolution", "4K"], BAD_INPUT, "unknown resolution '4K', expected 480P, 540P, 720P", ""),
        ([*GOOD, "--frames", "10"], BAD_INPUT, "10 frames are not 4 k \\+ 1; the nearest below is 9", ""),
        ([*GOOD, "--seconds", "-1"], BAD_INPUT, "got -1 seconds", ""),
        ([*GOOD, "--seconds", "nan"], BAD_INPUT, "got nan seconds", ""),
        ([*GOOD, "--seconds", "9999"], BAD_INPUT, "too many, the model has positions for 4077", ""),
        ([*GOOD, "--steps", "0"], BAD_INPUT, "got 0 steps", ""),
        ([*GOOD, "--seed", "-3"], BAD_INPUT, "seed -3 is not between", ""),
        ([*GOOD, "--max-ram", "0"], BAD_INPUT, "--max-ram 0 GiB leaves no memory", ""),
        ([*GOOD, "-o", "clip.gif"], BAD_INPUT, "clip.gif does not end in .mp4", ""),
        ([*GOOD, "--size", "1x1", "--steps", "0"], BAD_INPUT, "(?s)cannot be run:.*grid.*0 steps", ""),
        ([*GOOD, *SMALL, "--max-ram", "0.1"], WILL_NOT_FIT, "will not fit: .* 0.1 GiB may be used", "--resolution"),
        ([*GOOD, "--resolution", "720P", "--max-ram", "0.6"], WILL_NOT_FIT, "will not fit", "fewer --seconds"),
        ([*GOOD[:6]], MODEL_MISSING, "no model was given", "skyrun convert"),
        ([*GOOD[:7], "nowhere"], MODEL_MISSING, "the model nowhere does not exist", "skyrun convert"),
        (
            [*GOOD[:7], "{empty}"],
            MODEL_MISSING,
            "(?s)no transformer.*no text encoder.*no autoencoder",
            "skyrun convert",
        ),
        ([*GOOD[:7], "{checkpoint}"], MODEL_MISSING, "is a published checkpoint, which has to be converted", ""),
        ([*GOOD, "--quant", "Q2_K"], MODEL_MISSING, "has no Q2_K transformer", "it has Q8_0"),
        ([*GOOD[:7], "{cut}"], BAD_INPUT, "is not a usable GGUF file: .* ends at byte", "cut or damaged"),
        ([*GOOD[:7], "{foreign}"], BAD_INPUT, "is a model for a2v, not for r2v", "run a2v"),
        ([*GOOD[:7], "{liar}"], BAD_INPUT, "its metadata says layers = 9, its tensors 2", "again"),
        ([*GOOD[:7], "{headless}"], BAD_INPUT, "head.head.bias is missing, expected 64 numbers", "again"),
        ([*GOOD[:7], "{cut_vae}"], BAD_INPUT, "its tensors end at byte", "again"),
        ([*GOOD[:7], "{hole_in_vae}"], BAD_INPUT, "has no tensor decoder.middle.1.proj.weight", "again"),
        ([*GOOD[:7], "{hole_in_text}"], BAD_INPUT, "block 1 of .* has no tensor ffn_down.weight", "again"),
        ([*GOOD[:7], "{no_tokenizer}"], BAD_INPUT, "has no tokenizer inside", "skyrun convert"),
        (
            ["convert", "{holes}", "-o", "x"],
            BAD_INPUT,
            r"(?s)to_q.weight is missing.*\[3\], expected \[64\]",
            "again",
        ),
        (["convert", "nowhere", "-o", "x"], MODEL_MISSING, "nowhere does not exist", ""),
        (["convert", "{empty}", "-o", "x"], BAD_INPUT, "is not a SkyReels-V3 R2V checkpoint", "transformer/"),
        (["convert", PICTURE, "-o", "x"], BAD_INPUT, "is a file, expected a checkpoint folder", ""),
        (["convert", "{checkpoint}", "-o", "x", "--quant", "Q9"], BAD_INPUT, "cannot write .* 'Q9'", "Q8_0, Q4_K"),
        (["info", "nowhere"], MODEL_MISSING, "nowhere does not exist", ""),
        (["info", PICTURE], BAD_INPUT, "is not a usable GGUF file", ""),
        (["info", "{empty}"], BAD_INPUT, "is a folder", ""),
    ],
)
def test_mistakes_get_a_sentence_and_a_code(places, capsys, arguments, code, message, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(filled(arguments, places)) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(message, output.err), output.err
    assert hint in output.err.split("hint: ")[-1]
    assert "Traceback" not in output.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["run"], ["run", "r2v"], ["run", "r2v", "-p", "x", "--frames", "x"]]
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: skyrun" in capsys.readouterr().err


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
    assert main([*filled(GOOD, places), *SMALL, "-o", places["out"]]) == 1
    assert (tmp_path / "out.mp4").read_text() == "the old clip"
    assert not list(tmp_path.glob(".*partial"))


def test_a_full_disk_is_a_sentence(places, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    arguments = [*filled(GOOD, places), *SMALL, "--save-latents", "/dev/full/x", "-o", places["out"]]
    assert main(arguments) == 1
    assert "cannot write /dev/full/x" in capsys.readouterr().err
    assert not os.path.exists(places["out"])


def test_interrupting_leaves_nothing_half_written(places, tmp_path):
    command = [sys.executable, "-m", "skyrun", *filled(GOOD, places), "--size", "256x256", "--frames", "81", "--json"]
    command += ["--seed", "1", "-o", places["out"]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        if json.loads(line)["event"] == "BlockDone":
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
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
    lengths = [(n).to_bytes(8, "little") for n in (1 << 62, 4, 5)]
    for content in (b"", bytes(4), lengths[0], lengths[1] + b"[1] ", lengths[2] + b'{"a":'):
        path.write_bytes(content)
        assert main(["info", str(path)]) == BAD_INPUT
        assert "is not a usable safetensors file" in capsys.readouterr().err


def test_doctor_gives_verdicts(capsys):
    main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["subject"] for finding in findings] == ["Python", "torch", "GPU", "RAM", "disk"]
    assert all(finding["verdict"] in ("good", "slow", "fails") for finding in findings)
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


def test_the_demo_runs_the_whole_chain(tmp_path):
    assert main(["demo", "-o", str(tmp_path / "demo")]) == 0
    assert (tmp_path / "demo" / "clip.mp4").stat().st_size > 10_000
    assert len(list((tmp_path / "demo" / "model").iterdir())) == 3
