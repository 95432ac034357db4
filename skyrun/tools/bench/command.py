"""What `skyrun bench` does: measure, and show it. say: takes text for people. emit: takes a JSON object."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skyrun.cli.progress import progress
from skyrun.errors import FAILED
from skyrun.streaming.device import choose_device
from skyrun.tools.bench.checks import check_kernels
from skyrun.tools.bench.kernels import measure_kernels, plan_bench
from skyrun.tools.bench.report import checks_text, environment, measurements_text, step_text
from skyrun.tools.bench.step import measure_step

Say = Callable[[str], None]
Emit = Callable[[dict[str, Any]], None]


def kernels(arguments: Namespace, say: Say, emit: Emit) -> int:
    """Check the kernels and time them. Exit code 1 if one is wrong."""
    bench = plan_bench(arguments.device, arguments.types, arguments.rows)
    said = environment(bench.device)
    say("\n".join(f"{name}: {value}" for name, value in said.items()))
    checks = list(check_kernels(bench))
    say(checks_text(checks))
    measured = []
    passed = all(check.passed for check in checks)
    if passed:
        with progress() as display:
            display.begin("measuring", bench.total, "figures")
            for measurement in measure_kernels(bench):
                measured.append(measurement)
                display.advance(1)
            display.end()
    if arguments.json:
        results = {"checks": [check.as_json() for check in checks], "measurements": [one.as_json() for one in measured]}
        emit({"event": "result", "environment": said, **results})
    elif passed:
        print(measurements_text(measured))
    return 0 if passed else FAILED


def step(arguments: Namespace, say: Say, emit: Emit) -> int:
    """Run a synthetic model, streamed and from memory."""
    names = ("size", "frames", "seconds", "steps", "device", "dtype", "precision", "max_vram", "max_ram")
    settings = {name: getattr(arguments, name) for name in names} | {"resolution": arguments.resolution or "480P"}
    said = environment(choose_device(arguments.device))
    say("\n".join(f"{name}: {value}" for name, value in said.items()))
    with progress() as display:
        written = display.counter("writing", "bytes")
        events = measure_step(Path.cwd(), arguments.model, arguments.quant.upper(), arguments.blocks, settings, written)
        while True:
            try:
                display.show(next(events))
            except StopIteration as stop:
                figures = stop.value
                break
    if arguments.json:
        emit({"event": "result", "environment": said, **figures.as_json()})
    else:
        print(step_text(figures))
    return 0
