"""A run that takes a moment, and ways to disturb it."""

import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from skyrun.engine.run import run_job
from skyrun.events import Progress, StageStarted
from skyrun.planning.request import Request

STEPS = 4


def small_request(folder, model, **changes):
    """A request for five frames of 32 x 48 in `folder`."""
    picture = folder / "picture.png"
    if not picture.exists():
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)).save(picture)
    values = {"output": folder / "out" / "clip.mp4", "model": model, "size": (32, 48), "frames": 5, "device": "cpu"}
    return Request("r2v", "a sea", (picture,), **values | {"steps": STEPS, "seed": 3} | changes)


def is_at(event, stage, done):
    """Whether so many units of a stage are done with this event; done = 0: it begins."""
    if done == 0:
        return isinstance(event, StageStarted) and event.stage == stage
    return isinstance(event, Progress) and (event.stage, event.done) == (stage, done)


def stopped(job, stage, done, state=None):
    """Run a job up to there, and stop as Ctrl-C does."""
    events = run_job(job, state=state)
    for event in events:
        if is_at(event, stage, done):
            break
    events.close()


def followed(events):
    """The result of a run, and its events."""
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as stop:
            return stop.value, seen


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def fail(monkeypatch, place, error, calls):
    """Let a function or a method, such as "skyrun.models.dit.transformer.dit_block", fail in these calls of it.

    error: makes one, because an exception holds on to what failed.
    """
    parts = place.split(".")
    at = next(n for n, part in enumerate(parts) if part[0].isupper() or n == len(parts) - 1)
    owner = import_module(".".join(parts[:at]))
    for part in parts[at:-1]:
        owner = getattr(owner, part)
    right, count = getattr(owner, parts[-1]), iter(range(1 << 20))

    def fails(*arguments, **keywords):
        if next(count) in calls:
            raise error()
        return right(*arguments, **keywords)

    monkeypatch.setattr(owner, parts[-1], fails)


def fail_in_workers(monkeypatch, folder, cases, once=True, error='MemoryError("made to fail")'):
    """Let memory run out, or another thing happen, in processes that are started from now on.

    cases: [(number of the device, place, calls)], as for `fail`. once: not again in the workers that come after them.
    error: an expression that is evaluated there.
    """
    script = f"""
import os
from pathlib import Path
from types import SimpleNamespace

cases = [case for case in enumerate({cases!r}) if str(case[1][0]) == os.environ.get("LOCAL_RANK")]
if cases:
    from small_run import fail
    for number, (_, place, calls) in cases:
        failed = Path({str(folder)!r}) / f"failed-{{number}}"

        def error(failed=failed):
            failed.touch()
            return {error}

        if not ({once} and failed.exists()):
            fail(SimpleNamespace(setattr=setattr), place, error, calls)
"""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(script)
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), here, *filter(None, sys.path)]))


class Raises:
    """What a worker is sent to fail with an error."""

    def __init__(self, error):
        self._error = error

    def __call__(self, group, send):
        raise self._error
