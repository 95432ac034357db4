"""Triton that cannot be used: what runs instead, what is said, and what is compiled while something else works."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from without_triton import files_that_need_triton

import skyrun.kernels.triton as kernels_in_triton
from skyrun.engine import warm_up
from skyrun.engine.warm_up import WarmUp
from skyrun.events import Progress, StageEnded, StageStarted
from skyrun.kernels.machine import device
from skyrun.kernels.machine.device import triton_problem, uses_triton
from skyrun.kernels.machine.toolchain import Missing
from skyrun.planning import hardware
from skyrun.planning.hardware import this_machine
from skyrun.presets import Hardware

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
LACK = Missing("Triton finds no C compiler", "install gcc")


@pytest.fixture
def card(monkeypatch):
    """card(capability, error, lack): a GPU on which the first launch raises the error."""

    def install(capability=(8, 9), error=None, lack=None):
        def launch(device):
            if error:
                raise error

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(kernels_in_triton, "probe", SimpleNamespace(launch=launch), raising=False)
        monkeypatch.setattr(device, "missing", lambda: lack)
        triton_problem.cache_clear()

    yield install
    triton_problem.cache_clear()


@pytest.mark.parametrize(
    ("card_has", "says"),
    [
        ({}, ""),
        ({"lack": LACK}, ""),  # a launch works nevertheless: from the compiler's cache
        ({"capability": (7, 5)}, "the card has compute capability 7.5, Triton's kernels need 8.0"),
        (
            {"error": RuntimeError("Failed to find C compiler."), "lack": LACK},
            "Triton finds no C compiler: no int8 and slower decoding; install gcc",
        ),
        (
            {"error": subprocess.CalledProcessError(1, ["gcc"])},
            "Triton's kernels do not run here: Command '['gcc']' returned non-zero exit status 1.; "
            "`pip install -U triton` may help",
        ),
    ],
)
def test_what_keeps_triton_from_running_is_one_sentence(card, card_has, says):
    card(**card_has)
    assert triton_problem(CARD) == says
    assert uses_triton(CARD) == (not says) and not uses_triton(CPU)


@pytest.mark.parametrize("text", ["Triton Error [CUDA]: out of memory", "CUDA error: unspecified launch failure"])
def test_what_is_not_tritons_fault_is_raised(card, text):
    card(error=RuntimeError(text))
    with pytest.raises(RuntimeError, match=r"memory|launch failure"):
        uses_triton(CARD)
    card()
    assert uses_triton(CARD)  # nothing is remembered


@pytest.mark.parametrize("lack", [None, LACK])
def test_plans_do_without_int8_where_triton_is_missing(monkeypatch, tmp_path, lack):
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "missing", lambda: lack)
    monkeypatch.setattr(hardware, "probe", lambda *_, **__: Hardware("cuda", "a card", 1, 1, 1, 1, fast_gain=2.0))
    assert this_machine("cuda").fast_gain == (0.0 if lack else 2.0)


def warmed(monkeypatch, works):
    monkeypatch.setattr(warm_up, "uses_triton", lambda device: True)
    monkeypatch.setattr(warm_up, "blocks_of", lambda job: None)
    monkeypatch.setattr(warm_up, "launches", lambda blocks, device: works)

    class Job:
        device = CPU

    return WarmUp(Job())


def test_kernels_are_compiled_in_threads_and_shown_while_one_is_missing(monkeypatch):
    go, before = threading.Event(), threading.active_count()
    done = [threading.Event() for _ in range(2)]
    works = [done[0].set, done[1].set, lambda: go.wait(60) or 1 / 0]
    with warmed(monkeypatch, works) as kernels:
        for event in done:
            assert event.wait(60)
        while sum(launched.done() for launched in kernels._launched) < 2:
            pass
        events = kernels.finish()
        assert next(events) == StageStarted("kernels", 3, "kernels", 2)
        go.set()
        assert next(events) == Progress("kernels", 3)
        assert isinstance(next(events), StageEnded)
        assert list(events) == []
        assert list(kernels.finish()) == []
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: misaligned address")])
def test_a_lack_of_memory_while_compiling_is_not_hidden(monkeypatch, error):
    def work():
        raise error

    with warmed(monkeypatch, [work]) as kernels, pytest.raises(type(error)):
        list(kernels.finish())


ABSENT = {
    "Triton": ("import sys\nsys.modules['triton'] = None\n", os.environ.get("PATH", "")),
    "a compiler": ("", ""),
}
TESTS = ["test_choice.py", "test_soak.py"]
HERE = Path(__file__).parent


@pytest.fixture
def without(tmp_path):
    """without("Triton", "-m", "pytest") runs Python where that is absent."""

    def run(absent, *arguments):
        start, path = ABSENT[absent]
        (tmp_path / "sitecustomize.py").write_text(start)
        places = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": places, "PATH": path, "SKYRUN_TEST_ABSENT": absent}
        environment.pop("CC", None)
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.skipif("SKYRUN_TEST_ABSENT" in os.environ, reason="this is the Python without it")
@pytest.mark.parametrize("absent", ABSENT)
def test_tests_pass_in_a_python_without(without, absent):
    """A share of the tests; all of them run so where a change is tested, see .github/workflows/ci.yml."""
    tests = [str(HERE / name) for name in TESTS]
    done = without(absent, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    said = without(absent, "-c", "from skyrun.kernels.machine.toolchain import missing; print(missing())")
    assert {"Triton": "not installed", "a compiler": "no C compiler"}[absent] in said.stdout


@pytest.mark.long
def test_without_triton_only_tests_of_kernels_are_left_out(without):
    collect = ("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--collect-only", "-m", "", str(HERE))
    found = without("Triton", *collect)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr
    collected = {line.partition("::")[0].partition("/")[2] for line in found.stdout.splitlines() if "::" in line}
    left_out = {path.name for path in HERE.glob("test_*.py")} - collected
    assert left_out == set(files_that_need_triton()) and len(left_out) < 20
