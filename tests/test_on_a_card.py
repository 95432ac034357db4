"""The acceptance run in its small form, on a machine that lacks what lent ones lack, and what becomes of bad steps."""

import json
import os
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from acceptance import runner, stand_ins  # noqa: E402
from acceptance.report import report  # noqa: E402
from acceptance.step import Figure, Scale, Step  # noqa: E402
from acceptance.steps import STEPS  # noqa: E402

del sys.path[0]

CPU = torch.device("cpu")
ABSENT = ("gguf", "av", "ftfy", "shtab", "rich", "huggingface_hub", "diffusers")  # filelock comes with torch
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Runs the command where packages are absent."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    paths = f"{folder}{os.pathsep}{ROOT}"

    def run(*arguments):
        command = [sys.executable, str(ROOT / "benchmarks" / "on_a_card.py"), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": paths}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def results(bare, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "card.jsonl"
    return bare("--out", path), path


@pytest.mark.skipif(torch.cuda.is_available(), reason="the small form is for machines without a card")
class TestSmallForm:
    def test_every_step_prints_a_line_and_none_fails(self, results):
        done, path = results
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["name"] for line in lines] == [step.name for step in STEPS]
        wrong = [line for line in lines if line["passed"] is False]
        assert done.returncode == 0 and not wrong, done.stderr
        assert all(line["small"] and (line["figures"] or "skipped" in line) for line in lines)
        assert path.read_text() == done.stdout

    def test_only_steps_that_need_an_absent_package_are_skipped(self, results):
        lines = [json.loads(line) for line in results[0].stdout.splitlines()]
        expected = {"resume": "needs av"} | ({} if has_triton() else {"cold start": "needs triton"})
        assert {line["name"]: line["skipped"] for line in lines if "skipped" in line} == expected

    def test_a_second_start_runs_nothing(self, results, bare):
        done, path = results
        again = bare("--out", path)
        assert again.stdout == "" and again.returncode == 0
        assert again.stderr.count("already") == len(STEPS) and path.read_text() == done.stdout

    def test_the_report_has_every_figure(self, results, bare):
        text = bare("--report", results[1]).stdout
        for line in map(json.loads, results[0].stdout.splitlines()):
            assert f"| {line['step']} | {line['name']} |" in text
            assert all(f"| {figure['name']} |" in text for figure in line["figures"])
        assert "## For docs/kernels.md" in text and f"torch {torch.__version__}" in text

    @pytest.mark.parametrize("steps", ["4-2", "99", "x", "0-99"])
    def test_steps_that_are_none_are_refused(self, bare, steps):
        done = bare("--steps", steps)
        assert done.returncode == 2 and "not a range of steps" in done.stderr


def has_triton():
    try:
        import_module("triton")
    except ModuleNotFoundError:
        return False
    return True


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Steps that end in every way, in a module that their processes can import."""
    (tmp_path / "ways_to_end.py").write_text(
        textwrap.dedent("""
            import os, time
            from acceptance.step import Figure
            def passes(scale): yield Figure("x", 1.0, most=2)
            def too_much(scale): yield Figure("x", 3.0, most=2)
            def unjudged(scale): yield Figure("x", "a text")
            def raises(scale):
                yield Figure("x", 1.0, most=2)
                raise ValueError("broken")
            def lacks(scale):
                import surely_not_there
                yield
            def dies(scale):
                yield Figure("x", 1.0, most=2)
                os._exit(9)
            def hangs(scale):
                time.sleep(1000)
                yield
        """)
    )
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = import_module("ways_to_end")
    yield lambda name: Step(name, "", getattr(module, name))
    del sys.modules["ways_to_end"]


@pytest.mark.parametrize(
    ("name", "passed", "figures", "said"),
    [
        ("passes", True, 1, {}),
        ("too_much", False, 1, {}),
        ("unjudged", None, 1, {}),
        ("raises", False, 1, {"error": "ValueError: broken"}),
        ("lacks", None, 0, {"skipped": "needs surely_not_there"}),
        ("dies", False, 1, {"error": "the process ended with 9"}),
    ],
)
def test_however_a_step_ends_there_is_a_line(steps, name, passed, figures, said):
    line = runner.outcome(7, steps(name), CPU)
    assert (line["step"], line["name"], line["passed"], len(line["figures"])) == (7, name, passed, figures)
    assert {key: line[key] for key in ("error", "skipped") if key in line} == said
    assert json.loads(json.dumps(line)) == line
    assert name in report([line])


def test_a_step_that_takes_too_long_is_ended(steps):
    line = runner.outcome(0, steps("hangs"), CPU, limit=0.1)
    assert line["error"] == "did not end in time" and line["passed"] is False


@pytest.mark.parametrize(
    ("value", "least", "most", "passed"),
    [(1, None, None, None), (1, 1, 1, True), (1, 2, None, False), (3, 1, 2, False), (float("nan"), None, 1, False)],
)
def test_figures_are_judged_by_their_bounds(value, least, most, passed):
    assert Figure("x", value, "", least, most).passed is passed


def test_bounds_of_speed_count_on_a_card_only():
    assert Scale(CPU).on_card(1.0) is None and Scale(torch.device("cuda")).on_card(1.0) == 1.0


def test_the_stand_in_writes_what_gguf_writes(tmp_path):
    rng = np.random.default_rng(0)
    blocks, plain = rng.integers(0, 256, (3, 68), np.uint8), rng.standard_normal((5, 7)).astype(np.float32)
    written = []
    for number, package in enumerate((gguf, stand_ins.gguf())):
        path = tmp_path / str(number)
        writer = package.GGUFWriter(path, "wan")
        writer.add_string("a.text", "näme")
        writer.add_uint32("a.count", 7)
        writer.add_bool("a.flag", True)
        writer.add_float32("a.share", 0.25)
        for key, items in {"texts": ("x", "yz"), "bytes": b"123", "ints": (1, -2), "floats": (0.5, 2.0)}.items():
            writer.add_array(f"a.{key}", items)
        kinds = package.GGMLQuantizationType
        writer.add_tensor_info("w", blocks.shape, blocks.dtype, blocks.nbytes, raw_dtype=kinds["Q8_0"])
        writer.add_tensor_info("v", (3, 64), np.dtype(np.float32), blocks.nbytes, raw_dtype=kinds["Q8_0"])
        writer.add_tensor_info("b", plain.shape, plain.dtype, plain.nbytes, raw_dtype=kinds["F32"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in (blocks, blocks, plain):
            writer.write_tensor_data(data)
        writer.close()
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_what_is_absent_fails_where_it_is_used(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    module = stand_ins._av()
    assert isinstance(module.error.InvalidDataError, type)  # named in `except`
    with pytest.raises(ModuleNotFoundError, match="av"):
        module.open("clip.mp4")
    assert stand_ins._ftfy().fix_text("A red star.") == "A red star."
    with pytest.raises(ModuleNotFoundError, match="ftfy"):
        stand_ins._ftfy().fix_text("naïve")
