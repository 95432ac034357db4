"""The choice among ways to do the same: by what was measured, kept on disk for the versions it holds for."""

import json

import pytest
import torch

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.machine import choice, device
from skyrun.kernels.machine.cache import MeasuredFile

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of the test's own, and a clock that believes what the works say."""
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "median_seconds", lambda device, work: work() or getattr(work, "seconds", 0.0))
    forget(monkeypatch)
    return tmp_path


def forget(monkeypatch):
    """As a new process begins."""
    monkeypatch.setattr(choice, "_tables", {})


class Work:
    """Something that is said to take a while, or fails."""

    def __init__(self, seconds=0.0, error=None):
        self.seconds, self.error, self.runs = seconds, error, 0

    def __call__(self):
        self.runs += 1
        if self.error:
            raise self.error


def test_the_quickest_wins_and_is_not_measured_again(monkeypatch):
    works = {"slow": Work(0.02), "quick": Work(0.001)}
    assert choice.fastest(CPU, "work", works) == "quick"
    runs = [work.runs for work in works.values()]
    assert choice.fastest(CPU, "work", works) == "quick"
    forget(monkeypatch)
    assert choice.fastest(CPU, "work", works) == "quick"
    assert [work.runs for work in works.values()] == runs


def test_of_equals_the_first_wins():
    assert choice.fastest(CPU, "a", {"first": Work(1.02), "second": Work(1.0)}) == "first"
    assert choice.fastest(CPU, "b", {"first": Work(1.1), "second": Work(1.0)}) == "second"


def test_one_candidate_is_not_measured():
    work = Work()
    assert choice.fastest(CPU, "work", {"only": work}) == "only"
    assert work.runs == 0


def test_a_candidate_that_fails_is_none_until_the_process_ends(folder, monkeypatch):
    works = {"broken": Work(error=RuntimeError("no kernel image")), "whole": Work(0.01)}
    for _ in range(2):
        assert choice.fastest(CPU, "work", works) == "whole"
    assert works["broken"].runs == 1
    (file,) = folder.glob("*.json")
    assert json.loads(file.read_text())["seconds"] == {"work": {"whole": 0.01}}
    forget(monkeypatch)
    works["broken"].error = None
    assert choice.fastest(CPU, "work", works) == "broken"


def test_nothing_works():
    with pytest.raises(SkyrunError, match="nothing that could do work works on cpu"):
        choice.fastest(CPU, "work", {"a": Work(error=RuntimeError()), "b": Work(error=ValueError())})


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_what_is_no_fault_of_a_candidate_is_raised_and_says_nothing_about_later(error):
    works = {"large": Work(error=error), "small": Work()}
    with pytest.raises(RuntimeError):
        choice.fastest(CPU, "work", works)
    works["large"].error = None
    assert choice.fastest(CPU, "work", works) in works


def test_a_new_candidate_is_measured_alone():
    works = {"a": Work(0.003), "b": Work(0.004)}
    choice.fastest(CPU, "work", works)
    runs = works["a"].runs
    assert choice.fastest(CPU, "work", works | {"c": Work(0.0)}) == "c"
    assert works["a"].runs == runs


def test_other_versions_measure_anew(folder, monkeypatch):
    works = {"a": Work(), "b": Work()}
    choice.fastest(CPU, "work", works)
    (file,) = folder.glob("*.json")
    said = json.loads(file.read_text())
    said["holds_for"]["torch"] = "1.0"
    file.write_text(json.dumps(said))
    forget(monkeypatch)
    runs = works["a"].runs
    choice.fastest(CPU, "work", works)
    assert works["a"].runs > runs


@pytest.mark.parametrize("text", ["", "[]", "{", '{"holds_for": 1}', '{"seconds": {}}'])
def test_a_damaged_file_is_written_anew(folder, monkeypatch, text):
    works = {"a": Work(), "b": Work()}
    choice.fastest(CPU, "work", works)
    (file,) = folder.glob("*.json")
    file.write_text(text)
    forget(monkeypatch)
    choice.fastest(CPU, "work", works)
    assert set(json.loads(file.read_text())["seconds"]) == {"work"}


@pytest.mark.parametrize("taken", [-0.001, "0.1", [], True])
def test_a_time_that_cannot_be_is_measured_anew(folder, monkeypatch, taken):
    works = {"a": Work(0.02), "b": Work(0.01)}
    choice.fastest(CPU, "work", works)
    kept = MeasuredFile("kernels-cpu.json", choice.holds_for(CPU), dict)
    kept.update(lambda before: {"seconds": {"work": {"a": taken, "b": 0.5}}})
    forget(monkeypatch)
    assert choice.fastest(CPU, "work", works) == "b"
    assert kept.load() == {"seconds": {"work": {"a": 0.02, "b": 0.01}}}


def test_what_another_process_found_meanwhile_is_kept_and_learned(monkeypatch):
    choice.fastest(CPU, "first", {"a": Work(0.02), "b": Work(0.01)})
    mine = {name: dict(table) for name, table in choice._tables.items()}
    forget(monkeypatch)
    choice.fastest(CPU, "theirs", {"a": Work(0.02), "b": Work(0.01)})
    monkeypatch.setattr(choice, "_tables", mine)
    choice.fastest(CPU, "second", {"a": Work(0.02), "b": Work(0.01)})
    known = Work()
    assert choice.fastest(CPU, "theirs", {"a": known, "b": known}) == "b"
    assert known.runs == 0
    forget(monkeypatch)
    assert set(choice._table(CPU)) == {"first", "theirs", "second"}


def test_a_folder_that_cannot_be_written_does_not_stop_a_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path / "file" / "below"))
    assert choice.fastest(CPU, "work", {"slow": Work(0.01), "quick": Work()}) == "quick"


class Choosing(Work):
    """Work that has to choose on its way."""

    def __call__(self):
        self.chosen = choice.fastest(CPU, "inner", {"c": Work(2.0), "d": Work(1.0)})


def test_a_measurement_may_itself_choose():
    work = Choosing(0.1)
    assert choice.fastest(CPU, "outer", {"a": work, "b": Work(0.5)}) == "a"
    assert work.chosen == "d"
    assert set(choice._table(CPU)) == {"inner", "outer"}


def test_the_clock_takes_the_median():
    ticks = []
    assert device.median_seconds(CPU, lambda: None, 3, lambda: ticks.append(1)) >= 0
    assert len(ticks) == 3


@pytest.mark.parametrize(("rows", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (75600, 131072)])
def test_buckets(rows, power):
    assert choice.bucket(rows) == power
