"""A seeded share of benchmarks/fuzz.py: whatever is damaged, SkyrunError is all that comes out."""

import sys
from pathlib import Path

import pytest

from skyrun.errors import SkyrunError

pytest.importorskip("resource", reason="needs a system with limits for processes")

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import fuzz
import fuzz_kinds

del sys.path[0]

RUNS = 3  # of a kind with a share of 1, times its share
NAMES = (
    *("gguf", "gguf-convert", "safetensors", "safetensors-convert", "pth", "imatrix", "spiece", "tokenizer", "index"),
    *("request", "tag", "video", "audio", "image", "hub", "manifest", "tune", "choices", "embeddings", "state"),
    *("window", "journal", "config", "prompts"),
)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    with fuzz_kinds.kinds_in(tmp_path_factory.mktemp("fuzz")) as made:
        yield made


def test_every_kind_is_listed(kinds):
    assert set(kinds) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_good(kinds, name):
    """What is damaged would be read to its end."""
    for sample in kinds[name].samples:
        sample.path.write_bytes(sample.data)
        kinds[name].use(sample.path)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_comes_out(kinds, name):
    assert list(fuzz.batch(kinds[name], range(kinds[name].share * RUNS))) == []


@pytest.mark.parametrize(
    ("use", "found"),
    [
        (lambda path: 1 // 0, "ZeroDivisionError"),
        (lambda path: bytearray(4 << 30), "MemoryError"),
        (lambda path: fuzz.os.abort(), "SIGABRT"),
        (lambda path: fuzz.os._exit(7), "status 7"),
    ],
)
def test_what_must_not_come_out_is_found(tmp_path, use, found):
    sample = fuzz_kinds.Sample(tmp_path / "x", b"abc")
    problems = list(fuzz.batch(fuzz_kinds.Kind([sample], use, 1), range(5, 8)))
    assert [seed for seed, _ in problems] == [5, 6, 7]
    assert all(found in problem for _, problem in problems)


def test_what_may_come_out_is_not(tmp_path):
    def refuse(path):
        raise SkyrunError("no", "hint")

    sample = fuzz_kinds.Sample(tmp_path / "x", b"abc")
    assert list(fuzz.batch(fuzz_kinds.Kind([sample], refuse, 1), range(9))) == []
