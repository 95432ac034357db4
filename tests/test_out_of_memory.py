"""Memory runs out at places that a seed draws (benchmarks/out_of_memory.py goes through all of them)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from out_of_memory import Runs

del sys.path[0]

SHARE = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKYRUN_CACHE", "")  # put back afterwards: every run has a cache of its own
        yield Runs(tmp_path_factory.mktemp("runs"))


def test_every_part_of_a_run_allocates(runs):
    """The places that are watched: in models, in the threads that load, and in what a run does between them."""
    files = {Path(file).name for place in runs.counts for file, _ in place}
    assert {
        "block.py",
        "transformer.py",
        "umt5.py",
        "vae.py",
        "ring.py",
        "stream.py",
        "samplers.py",
        "stages.py",
    } <= files
    loading = [place for place in runs.counts if Path(place[-1][0]).name == "stream.py"]
    assert loading, "no allocation in a thread that loads"


def test_a_run_without_memory_somewhere_ends_well(runs):
    cases = runs.cases(drawn=100)
    assert len(cases) > 300
    assert [problem for case in cases[:: len(cases) // SHARE] if (problem := runs.outcome(case))] == []
