"""`skyrun bench`: measure this machine, and show the figures."""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import torch

from skyrun.cli.console import display, emit, say
from skyrun.cli.progress import shown
from skyrun.engine.run import run_job
from skyrun.engine.together import workers
from skyrun.errors import FAILED
from skyrun.parallel.team import Done
from skyrun.streaming.device import choose_device
from skyrun.tools.bench.checks import Check, check_kernels
from skyrun.tools.bench.kernels import measure_kernels, plan_bench
from skyrun.tools.bench.measurement import Measurement, environment
from skyrun.tools.bench.step import StepFigures, measure_exchange, measure_step
from skyrun.units import duration, table

_SETTINGS = ("size", "frames", "seconds", "steps", "device", "dtype", "precision", "attention", "max_vram", "max_ram")


def execute(arguments: Namespace) -> int:
    """Measure kernels or denoising steps on this machine."""
    return _kernels(arguments) if arguments.what == "kernels" else _step(arguments)


def _kernels(arguments: Namespace) -> int:
    """Check the kernels and time them. Exit code 1 if one is wrong."""
    bench = plan_bench(arguments.device, arguments.types, arguments.rows)
    surroundings = environment(bench.device)
    say(_lines(surroundings))
    checks = list(check_kernels(bench))
    say(checks_text(checks))
    passed = all(check.passed for check in checks)
    measured = shown(measure_kernels(bench), False) if passed else []
    if arguments.json:
        results = {"checks": [check.as_json() for check in checks], "measurements": [one.as_json() for one in measured]}
        emit({"event": "result", "environment": surroundings, **results})
    elif passed:
        display(measurements_text(measured))
    return 0 if passed else FAILED


def _step(arguments: Namespace) -> int:
    """Run a synthetic model, streamed and from memory."""
    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    settings["resolution"] = arguments.resolution or "480P"
    surroundings = environment(choose_device(arguments.device))
    say(_lines(surroundings))
    quant = arguments.quant.upper()
    devices = arguments.devices or 1
    measuring = measure_step(
        Path.cwd(), arguments.model, quant, arguments.blocks, settings, devices, lambda job: run_job(job, False)
    )
    figures, rate = shown(measuring, False), None
    if devices > 1:
        rate = exchange_rate(devices, choose_device(arguments.device, devices))
    if arguments.json:
        emit({"event": "result", "environment": surroundings, "exchange_rate": rate, **figures.as_json()})
    else:
        display(step_text(figures))
        if rate is not None:
            display(f"devices send each other {rate / 1e9:.2f} GB/s each")
    return 0


def exchange_rate(devices: int, device: torch.device) -> float:
    """Bytes per second that each of several devices sends to the others, as measured."""
    with closing(workers(devices, device)) as team:
        team.send(measure_exchange)
        for rank, message in team.messages():
            if rank == 0 and isinstance(message, Done):
                return float(message.value)
    raise AssertionError("the messages of a team have no end")


def _lines(values: dict[str, str]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in values.items())


def checks_text(checks: Sequence[Check]) -> str:
    """One line if every check passed, else a table of those that did not."""
    wrong = [check for check in checks if not check.passed]
    if not wrong:
        return f"all {len(checks)} checks passed"
    rows = [("wrong", "error", "allowed")]
    rows += [(check.what, f"{check.error:.2e}", f"{check.allowed:.2e}") for check in wrong]
    return table(rows)


def measurements_text(measured: Sequence[Measurement]) -> str:
    """Tables of decoding, linear layers, attention and blocks. Ratios refer to the resident weight or the copy."""
    parts = (_decode(measured), _linear(measured), _attention(measured), _blocks(measured))
    return "\n\n".join(part for part in parts if part)


def step_text(figures: StepFigures) -> str:
    """The peak of each stage, and what streaming costs."""
    plan = {stage.name: stage.device_bytes or stage.host_bytes for stage in figures.plan.stages}
    rows = [("stage", "time", "peak GB", "planned GB")]
    for stage in figures.stages:
        planned = f"{plan[stage.stage] / 1e9:.2f}" if stage.stage in plan else "-"
        rows.append((stage.stage, duration(stage.seconds), f"{stage.peak_bytes / 1e9:.2f}", planned))
    read, plain = figures.read_rate, figures.plain_rate
    beside = f"a plain read {plain / 1e9:.2f} GB/s, ratio {read / plain:.2f}" if plain else "no plain read to compare"
    together = []
    if figures.together is not None:
        ratio = figures.together / figures.streamed
        together = [f"on {figures.devices} devices, streamed: {figures.together:.3f} s, ratio {ratio:.3f}"]
    return "\n".join(
        [
            table(rows),
            f"a step of {figures.blocks} blocks, {figures.tokens} tokens: streamed {figures.streamed:.3f} s, "
            f"from memory {figures.resident:.3f} s, ratio {figures.streamed / figures.resident:.3f}",
            *together,
            f"read at {read / 1e9:.2f} GB/s, {beside}; waited for weights {figures.stalled:.1%} of the time",
        ]
    )


def _of(measured: Iterable[Measurement], part: str) -> list[Measurement]:
    return [one for one in measured if one.part == part]


def _rate(amount: float, seconds: float | None, scale: float) -> str:
    return f"{amount / seconds / scale:.1f}" if seconds else "-"


def _ratio(seconds: float | None, baseline: float | None) -> str:
    return f"{seconds / baseline:.3f}" if seconds and baseline else "-"


def _milliseconds(seconds: float | None) -> str:
    return f"{seconds * 1e3:.3f}" if seconds else "does not fit"


def _decode(measured: Sequence[Measurement]) -> str:
    (copy,) = _of(measured, "copy")
    rows = [("decode", "ms", "GB/s", "of a copy's")]
    rows.append((copy.what, _milliseconds(copy.seconds), _rate(copy.nbytes, copy.seconds, 1e9), "1.000"))
    for one in _of(measured, "decode"):
        if one.seconds and copy.seconds:
            share = (one.nbytes / one.seconds) / (copy.nbytes / copy.seconds)
            rows.append((one.what, _milliseconds(one.seconds), _rate(one.nbytes, one.seconds, 1e9), f"{share:.3f}"))
    return table(rows)


def _linear(measured: Sequence[Measurement]) -> str:
    """A line for each weight and number of rows: the time of each backend relative to that of the resident weight."""
    lines = _of(measured, "linear")
    resident = {(one.what, one.rows): one for one in lines if one.way == "resident"}
    ways = ("exact", "fast", "torch decode")
    rows = [("linear", "rows", "resident ms", "TFLOP/s", *(f"{way} /" for way in ways))]
    by_work: dict[tuple[str, int], dict[str, float | None]] = {}
    for one in lines:
        if one.way != "resident":
            by_work.setdefault((one.what, one.rows), {})[one.way] = one.seconds
    for (what, count), taken in by_work.items():
        base = resident[what.split()[1], count]
        ratios = (_ratio(taken[way], base.seconds) for way in ways)
        rate = _rate(base.operations, base.seconds, 1e12)
        rows.append((what, str(count), _milliseconds(base.seconds), rate, *ratios))
    return table(rows)


def _attention(measured: Sequence[Measurement]) -> str:
    rows = [("attention", "tokens", "backend", "ms", "TFLOP/s")]
    for one in _of(measured, "attention"):
        rate = _rate(one.operations, one.seconds, 1e12)
        rows.append((one.what, str(one.rows), one.way, _milliseconds(one.seconds), rate))
    return table(rows)


def _blocks(measured: Sequence[Measurement]) -> str:
    rows = [("block", "tokens", "backend", "time", "over resident")]
    baseline: dict[int, float | None] = {}
    for one in _of(measured, "block"):
        if one.way == "resident":
            baseline[one.rows] = one.seconds
        taken = duration(one.seconds) if one.seconds and one.seconds > 1 else f"{_milliseconds(one.seconds)} ms"
        rows.append((one.what, str(one.rows), one.way, taken, _ratio(one.seconds, baseline[one.rows])))
    return table(rows)
