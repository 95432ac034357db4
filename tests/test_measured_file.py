"""Files of measurements: other versions, damage and impossible values count for nothing; processes share them."""

import json
import os
import stat
import subprocess
import sys

import pytest

from skyrun.errors import SkyrunError
from skyrun.kernels.machine.cache import MeasuredFile, cache_folder, checked

VALUES = {"rates": {"linear": 1e12, "decode": 0.25}, "names": ["a", "b"]}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path / "cache"))
    kept = MeasuredFile("some.json", {"torch": "2", "chip": "x"}, dict)
    assert kept.load() is None
    kept.update(lambda before: VALUES)
    return kept


def test_what_was_saved_is_loaded_by_the_same_versions_only(file):
    assert file.load() == VALUES
    for other in ({"torch": "2"}, {"torch": "3", "chip": "x"}, {"torch": "2", "chip": "x", "skyrun": ""}, {}):
        assert MeasuredFile("some.json", other, dict).load() is None


def test_only_the_user_may_read_it(file):
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    os.chmod(file.path, 0o644)
    file.update(lambda before: VALUES)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_no_flipped_bit_changes_a_value(file):
    whole = file.path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.path.write_bytes(damaged)
        assert file.load() in (None, VALUES)  # one in a space changes nothing


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", "0", '"a"', '{"holds_for": 1}', "[" * 100_000, b"\xff\xfe", '{"checksum": {}}']
)
def test_what_is_no_such_file_counts_for_nothing(file, text):
    file.path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert file.load() is None
    file.update(lambda before: {"before": before})
    assert file.load() == {"before": None}


def test_a_folder_in_its_place_counts_for_nothing(file):
    file.path.unlink()
    file.path.mkdir()
    assert file.load() is None
    with pytest.raises(OSError):
        file.update(lambda before: VALUES)


@pytest.mark.parametrize("value", [-1, -1e-9, float("nan"), float("inf"), 10**400, "1", None, True, [1], {}])
def test_no_measurement(value):
    with pytest.raises(ValueError, match="is not a measurement"):
        checked(value)


@pytest.mark.parametrize("value", [0, 1, 2.5, 1e300])
def test_a_measurement(value):
    assert checked(value) == value


def test_a_value_that_cannot_be_counts_for_nothing(file):
    def parse(values):
        return {name: checked(rate) for name, rate in values["rates"].items()}

    kept = MeasuredFile("other.json", {}, parse)
    kept.update(lambda before: {"rates": {"linear": 1.0}})
    assert kept.load() == {"linear": 1.0}
    for rates in ({"linear": -1.0}, {"linear": "1"}, [], 3, None):
        kept.update(lambda before, rates=rates: {"rates": rates})
        assert kept.load() is None
    with pytest.raises(ValueError):
        kept.update(lambda before: {"rates": {"linear": float("nan")}})
    assert [path.name for path in kept.path.parent.glob(".*partial")] == []


def test_processes_that_save_at_once_lose_nothing(tmp_path):
    code = """if True:
        import sys
        from skyrun.kernels.machine.cache import MeasuredFile
        file = MeasuredFile("shared.json", {}, dict)
        for number in range(25):
            file.update(lambda before: {**(before or {}), f"{sys.argv[1]}-{number}": number})
        """
    env = os.environ | {"SKYRUN_CACHE": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code, name], env=env) for name in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    said = json.loads((tmp_path / "shared.json").read_text())
    assert {f"{name}-{number}" for name in "abc" for number in range(25)} <= set(said)


def test_a_user_without_a_home(monkeypatch, tmp_path):
    for name in ("SKYRUN_CACHE", "XDG_CACHE_HOME", "HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    with pytest.raises(SkyrunError, match="HOME is not set") as caught:
        cache_folder()
    assert "SKYRUN_CACHE" in caught.value.hint
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "skyrun"
