"""Models that were fetched: listed, removed, and found without what fetches them."""

import os
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from PIL import Image

from skyrun.cli import main
from skyrun.errors import SkyrunError
from skyrun.hub.local import wanted_name, whole_folder
from skyrun.hub.store import remove, stored


@pytest.fixture
def pulled(hub, tmp_path):
    """Two whole models, and a third that was begun."""
    assert main(["pull", "r2v:Q8_0"]) == 0 and main(["pull", "r2v:Q4_K"]) == 0
    hub.damaged.add("transformer/diffusion_pytorch_model.safetensors")
    assert main(["pull", "v2v:Q8_0"]) == 1
    return tmp_path / "models"


def test_list_and_remove(pulled, capsys):
    models = {model.name: model for model in stored()}
    assert {name: model.complete for name, model in models.items()} == {
        **{"r2v:Q4_K": True, "r2v:Q8_0": True},
        "v2v:Q8_0": False,
    }
    whole = models["r2v:Q8_0"]
    assert whole.nbytes > 1e6 and whole.task == "r2v" and list(whole.commits) == ["Skywork/SkyReels-V3-R2V-14B"]
    capsys.readouterr()
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert "r2v:Q8_0" in said and "not complete" in said and "Skywork/SkyReels-V3-V2V-14B" in said
    assert main(["remove", "r2v"]) == 2
    assert "may be any of r2v-Q4_K, r2v-Q8_0" in capsys.readouterr().err
    assert main(["remove", "r2v:Q8_0"]) == 0 and not (pulled / "r2v-Q8_0").exists()
    assert whole_folder(wanted_name("r2v", "r2v", "Q4_K")) == pulled / "r2v-Q4_K", "shared files are still there"
    assert main(["remove", "v2v"]) == 0 and main(["remove", "r2v-Q4_K"]) == 0
    assert [*pulled.iterdir()] == []
    assert main(["remove", "r2v"]) == 4 and main(["list"]) == 0
    assert "no model in" in capsys.readouterr().err


def test_what_somebody_else_keeps_there_stays(pulled):
    folder = pulled / "r2v-Q8_0"
    (folder / "notes.txt").write_text("mine")
    (pulled / "own").mkdir()
    (pulled / "own" / "model.gguf").write_text("mine")
    remove("r2v:Q8_0")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    for name in ("own", "r2v-Q8_0", "../own", str(pulled / "own"), "", "*"):
        with pytest.raises(SkyrunError, match="there is no model"):
            remove(name)
    assert (pulled / "own" / "model.gguf").exists()


def test_a_model_that_is_being_fetched_is_not_removed(pulled):
    with FileLock(pulled / "r2v-Q8_0" / ".lock"), pytest.raises(SkyrunError, match="cannot be removed"):
        remove("r2v:Q8_0")
    assert whole_folder(wanted_name("r2v:Q8_0", "r2v", None))


def test_a_use_is_put_on_record(pulled, run_command):
    then = time.time() - 1e6
    for record in pulled.glob("*/skyrun-model.json"):
        os.utime(record, (then, then))
    assert main([*run_command, "--quant", "Q4_K", "--dry-run"]) == 0
    used = {model.name: model.used for model in stored()}
    assert used["r2v:Q4_K"] > then + 1e5 and used["r2v:Q8_0"] < then + 1


@pytest.mark.parametrize(
    ("model", "is_path"),
    [
        ("nowhere", True),
        ("a/b", True),
        ("/a/b:Q8_0", True),
        (None, False),
        ("v2v", False),
        ("v2v:Q4_K", False),
        ("a/b:Q8_0", False),
    ],
)
def test_a_path_or_a_name(model, is_path):
    name = wanted_name(model, "v2v", None)
    assert (name is None) is is_path
    if name is not None:
        assert str(name) == (model or "v2v")


def test_a_run_with_files_that_are_there_imports_neither_quantizer_nor_hub(converted, tmp_path):
    Image.new("RGB", (48, 32), "teal").save(tmp_path / "her.png")
    words = ["run", "r2v", "-p", "a sea", "--image", "her.png", "--size", "32x48", "--frames", "5", "--dry-run"]
    program = (
        "import sys; from skyrun.cli import main; assert main(sys.argv[1:]) == 0;"
        "print(*(name for name in sys.modules if name.startswith(('skyrun.quant', 'huggingface_hub'))))"
    )
    command = [sys.executable, "-c", program, *words, "--model", str(converted("Q8_0"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
