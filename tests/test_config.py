"""The user's defaults, and the reference of the command line."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from skyrun.cli import main
from skyrun.cli.main import _apply_config
from skyrun.cli.reference import reference
from skyrun.errors import BAD_INPUT

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config("text") writes the file."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def write(text):
        path = tmp_path / "skyrun" / "config.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


DAMAGED = [
    ("prefer = \n", "line 1"),
    ('quant = "Q8_0"\nprefer = "sped"\n', "line 2: unknown preference 'sped', expected balanced, quality"),
    ('quant = "Q8_0"\n\nresolution = "4K"\n', "line 3: unknown resolution '4K'"),
    ("# mine\nmodels = 3\n", "line 2: models is 3, expected text in quotes"),
    ('size = "480P"\n', "line 1: unknown name 'size', expected models, resolution, quant, prefer"),
    ("[quant]\nx = 1\n", "line 1: quant is {'x': 1}"),
    (b"quant = \"\xff\"\n", "cannot be read"),
    ("x = " + "[" * 5000, "cannot be read"),
    ("# long\n" * 20_000, "is longer than 65536 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), DAMAGED)
def test_a_damaged_config_names_the_line(config, capsys, text, message):
    path = config(text)
    assert main(["doctor"]) == BAD_INPUT
    said = capsys.readouterr().err
    assert str(path) in said and message in said and "hint: correct that line" in said


def test_doctor_shows_the_defaults(config, capsys):
    main(["doctor"])
    assert "config.toml: not there" in capsys.readouterr().out
    config('\ufeffprefer = "speed"\nresolution = "540p"\n')
    main(["doctor"])
    assert "resolution = 540P, prefer = speed" in capsys.readouterr().out
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["config"]["prefer"] == "speed"


TEXT = 'resolution = "540P"\nquant = "q6_k"\nprefer = "speed"\n'
USES = [
    ({"command": "run", "task": "r2v"}, {"resolution": "540P", "quant": "Q6_K", "prefer": "speed"}),
    ({"command": "run", "task": "a2v"}, {"resolution": None}),  # has no 540P
    ({"command": "run", "task": "r2v", "size": "32x32"}, {"resolution": None}),
    ({"command": "run", "task": "r2v", "resolution": "720P", "prefer": "memory"}, {"resolution": "720P"}),
    ({"command": "run", "task": "r2v", "model": "files/"}, {"quant": None}),  # what is there counts
    ({"command": "run", "task": None, "source": "a.mp4"}, {"resolution": None, "prefer": None}),  # that clip counts
    ({"command": "plan", "task": "r2v"}, {"resolution": "540P", "prefer": "speed", "quant": None}),
    ({"command": "pull", "task": None}, {"quant": "Q6_K"}),
    ({"command": "info", "task": None}, {"quant": None}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), USES)
def test_defaults_hold_where_an_option_says_nothing(config, given, expected):
    config(TEXT)
    nothing = dict.fromkeys(("resolution", "size", "quant", "prefer", "model", "source"))
    arguments = Namespace(**nothing | given)
    _apply_config(arguments)
    assert {name: getattr(arguments, name) for name in expected} == expected


def test_the_models_folder(config, monkeypatch, tmp_path):
    from skyrun.hub.store import models_folder

    config(f'models = "{tmp_path}/big"\n')
    monkeypatch.setenv("SKYRUN_MODELS", "/of/the/shell")
    _apply_config(Namespace(command="info"))
    assert models_folder() == Path("/of/the/shell")
    monkeypatch.delenv("SKYRUN_MODELS")
    _apply_config(Namespace(command="info"))
    assert models_folder() == tmp_path / "big"


def test_the_reference_is_current():
    said = (ROOT / "docs" / "cli.md").read_text()
    assert said == reference(), "run python -m skyrun.cli.reference > docs/cli.md"
