"""Run steps, each in a process of its own: what one breaks or leaves behind, the next does not meet."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any

import torch

from acceptance.stand_ins import install
from acceptance.step import NotHere, Scale, Step

LIMIT = 240.0  # seconds that a step may take on a card
SMALL_LIMIT = 1200.0  # elsewhere, beside the work of others


def outcome(number: int, step: Step, device: torch.device, limit: float | None = None) -> dict[str, Any]:
    """Run a step to its end or its limit. Returns its line of the results."""
    limit = limit or (SMALL_LIMIT if device.type == "cpu" else LIMIT)
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    start, when = time.monotonic(), datetime.now().isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="skyrun-card-") as folder:
        own = {"SKYRUN_CACHE": folder, "TMPDIR": folder, **step.environment}
        with _environment(own | (step.on_cpu if device.type == "cpu" else {})):
            process = spawn.Process(target=_work, args=(step, device, sender))
            process.start()
        sender.close()
        try:
            found = _received(receiver, process, start + limit)
        finally:
            _end(process)
    line = {"step": number, "name": step.name, "small": device.type == "cpu", "date": when, **found}
    return line | {"seconds": round(time.monotonic() - start, 1), "passed": _passed(found)}


def _received(receiver: Connection, process: Any, deadline: float) -> dict[str, Any]:
    """The figures that arrive until the step ends, and how it ended."""
    found: dict[str, Any] = {"figures": []}
    while receiver.poll(max(0.0, deadline - time.monotonic())):
        try:
            key, value = receiver.recv()
        except EOFError:  # the process is gone
            process.join()
            return found | {"error": f"the process ended with {process.exitcode}"}
        if key == "end":
            return found | value
        if key == "figure":
            found["figures"].append(value)
        else:
            found[key] = value
    return found | {"error": "did not end in time"}


def _passed(found: Mapping[str, Any]) -> bool | None:
    """None: skipped, or nothing to judge."""
    judged = [figure["passed"] for figure in found["figures"] if figure["passed"] is not None]
    if "error" in found:
        return False
    return None if "skipped" in found or not judged else all(judged)


def _end(process: Any) -> None:
    """End the process and those that it has started."""
    with suppress(ProcessLookupError, PermissionError):  # of a group that it has not made yet, or that is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """A process that is started meanwhile has these variables."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _work(step: Step, device: torch.device, sender: Connection) -> None:
    """In the process of a step: send each figure as it is found, and at last how the step ended."""
    os.setsid()
    install()
    from skyrun.streaming.device import join_free_memory, use_device
    from skyrun.tools.bench.measurement import environment

    if device.type == "cuda":
        join_free_memory()
    try:
        use_device(device)
        sender.send(("environment", environment(device)))
        torch.manual_seed(0)
        for figure in step.run(Scale(device)):
            sender.send(("figure", figure.as_json()))
        end = {}
    except ModuleNotFoundError as error:
        end = {"skipped": f"needs {error.name}"}
    except NotHere as error:
        end = {"skipped": str(error)}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        end = {"error": f"{type(error).__name__}: {error}"[:500]}
    sender.send(("end", end))
