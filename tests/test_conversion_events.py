"""Conversions say how far they are by events, and can be left at any of them."""

import threading
import time
from pathlib import Path

import pytest

from skyrun.errors import SkyrunError
from skyrun.events import Notice, Progress, StageEnded, StageStarted, drain
from skyrun.quant.compare import compare as compare_files
from skyrun.quant.partial import partial_path
from skyrun.quant.plan import Settings
from skyrun.quant.planner import plan_conversion
from skyrun.tools import convert


def watch(generator):
    """The events, and the value."""
    events = []
    while True:
        try:
            events.append(next(generator))
        except StopIteration as stop:
            return events, stop.value


def check_stage(events, stage, unit):
    """One stage, from its start to its total."""
    started, *steps, ended = events
    assert (started.stage, started.unit) == (stage, unit)
    assert all(isinstance(step, Progress) and step.stage == stage for step in steps)
    done = [started.before, *(step.done for step in steps)]
    assert done == sorted(done) and done[-1] == started.total
    assert isinstance(ended, StageEnded) and ended.stage == stage and ended.seconds >= 0
    return started


def test_a_plan_counts_matrices(checkpoint, tmp_path):
    events, conversion = watch(convert.plan(checkpoint, tmp_path, Settings("Q4_K")))
    started = check_stage(events, "measure", "matrices")
    assert len(events) == started.total + 2
    assert conversion.summary() == plan_conversion(checkpoint, tmp_path, Settings("Q4_K")).summary()


def test_files_count_bytes_and_go_on_where_they_were(checkpoint, tmp_path):
    conversion = drain(convert.plan(checkpoint, tmp_path, Settings("Q8_0")))
    writing = convert.write(conversion)
    transformer = conversion.files[0]
    for event in writing:
        if isinstance(event, Progress) and event.done > transformer.nbytes / 2:
            break
    writing.close()
    assert convert.unfinished(conversion) == [partial_path(transformer.path)]
    (notice, *events), value = watch(convert.write(conversion))
    assert value is None
    assert isinstance(notice, Notice) and "were finished before" in notice.text
    stages = [event.stage for event in events if isinstance(event, StageStarted)]
    assert stages == [f"convert {file.path.name}" for file in conversion.files]
    for stage, file in zip(stages, conversion.files, strict=True):
        of_it = [event for event in events if event.stage == stage]
        first, last = of_it[0], of_it[-2]
        assert (first.total, first.unit) == (file.nbytes, "bytes") and isinstance(of_it[-1], StageEnded)
        tensors = sum(tensor.nbytes for tensor in file.tensors)
        assert tensors - len(file.tensors) < last.done <= tensors  # shares of a tensor are rounded down
        assert file.path.stat().st_size == file.nbytes
    assert convert.unfinished(conversion) == []


def test_a_comparison_counts_bytes(checkpoint, converted):
    path = next(converted("Q4_K").glob("SkyReels*.gguf"))
    events, errors = watch(convert.compare(path, checkpoint))
    check_stage(events, "compare", "bytes")
    assert errors == compare_files(path, checkpoint)


def test_errors_are_drawn_for_each_transformer(checkpoint, tmp_path):
    conversion = drain(convert.plan(checkpoint, tmp_path / "model", Settings("Q4_K")))
    drain(convert.write(conversion))
    report = tmp_path / "report.html"
    events, _ = watch(convert.draw_errors(conversion, report, Path("some.dat")))
    assert isinstance(events[-1], Notice) and str(report) in events[-1].text
    assert "weighted by some.dat" in report.read_text()


def test_a_failure_ends_no_stage(tmp_path, checkpoint, converted):
    with pytest.raises(SkyrunError, match="does not exist|no such|nothing"):
        watch(convert.plan(tmp_path / "nowhere", tmp_path, Settings()))
    path = next(converted("Q8_0").glob("SkyReels*.gguf"))
    seen = []
    with pytest.raises(SkyrunError, match="of the same shapes"):
        for event in convert.compare(path, converted("Q8_0", "a2v")):
            seen.append(event)
    assert seen == []
    with pytest.raises(SkyrunError, match="cannot encode on 'nowhere'"):
        watch(convert.plan(checkpoint, tmp_path, Settings(), "nowhere"))


def test_work_ends_with_the_one_who_watched(checkpoint, tmp_path, monkeypatch):
    measured = []

    def slow(tensor, types, weights):
        measured.append(tensor.name)
        time.sleep(0.05)
        return dict.fromkeys(types, 0.0)

    monkeypatch.setattr("skyrun.quant.planner.sampled_errors", slow)
    before = threading.active_count()
    plan = convert.plan(checkpoint, tmp_path, Settings("Q4_K"))
    started = next(plan)
    plan.close()
    assert len(measured) <= 3 < started.total
    assert threading.active_count() == before
