"""Draw a plan as two charts: memory over the stages of a run, and the time of a step over its tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from skyrun.errors import SkyrunError
from skyrun.media.image import write_image
from skyrun.planning.what_if import Planned
from skyrun.presets.memory import CONTEXT_BYTES, GIB, PROCESS_BYTES, staging_bytes
from skyrun.presets.plan import StagePlan
from skyrun.presets.timing import break_even_tokens, step_time, with_tokens
from skyrun.units import duration

_WIDTH, _HEIGHT = 860, 330  # of each chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 24, 58, 46
_FINE = 2  # factor of supersampling, for smooth lines
_INK, _PALE, _GRID = "#222222", "#777777", "#dddddd"
# Distinguishable with color blindness (Okabe and Ito).
_BLUE, _ORANGE, _GREEN, _GRAY, _RED = "#0072b2", "#e69f00", "#009e73", "#b0b0b0", "#d55e00"
_PARTS = {"system": _GRAY, "blocks passing": _BLUE, "blocks kept": _GREEN, "activations": _ORANGE}


@dataclass(frozen=True)
class _Axes:
    """The axes of a chart: map values to pixels, and draw."""

    draw: ImageDraw.ImageDraw
    top: int
    x: Callable[[float], float]
    y: Callable[[float], float]

    def text(self, at: tuple[float, float], text: str, fill: str = _INK, anchor: str = "la", size: int = 12) -> None:
        place = (at[0] * _FINE, at[1] * _FINE)
        self.draw.text(place, text, fill, ImageFont.load_default(size * _FINE), anchor)

    def line(self, points: list[tuple[float, float]], fill: str, width: int = 1) -> None:
        self.draw.line([(x * _FINE, y * _FINE) for x, y in points], fill, width * _FINE, "curve")

    def box(self, left: float, top: float, right: float, bottom: float, fill: str) -> None:
        self.draw.rectangle(tuple(side * _FINE for side in (left, top, right, bottom)), fill)

    def dots(self, start: tuple[float, float], end: tuple[float, float], fill: str) -> None:
        """A dotted line."""
        steps = max(1, int(math.dist(start, end) / 6))
        for step in range(0, steps, 2):
            ends = [tuple(a + (b - a) * at / steps for a, b in zip(start, end, strict=True)) for at in (step, step + 1)]
            self.line(ends, fill)  # type: ignore[arg-type]


def write_plan_chart(path: Path, planned: Planned) -> None:
    """Draw both charts and write them as PNG."""
    if path.suffix.lower() != ".png":
        raise SkyrunError(f"{path} does not end in .png", "name it plan.png")
    image = Image.new("RGB", (_WIDTH * _FINE, 2 * _HEIGHT * _FINE), "white")
    draw = ImageDraw.Draw(image)
    _draw_memory(draw, planned)
    _draw_steps(draw, planned)
    write_image(path, image.resize((_WIDTH, 2 * _HEIGHT), Image.Resampling.LANCZOS).quantize(96))


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    scale = _linear(math.log(low), math.log(high), start, end)
    return lambda value: scale(math.log(value))


def _draw_memory(draw: ImageDraw.ImageDraw, planned: Planned) -> None:
    """Draw a column of VRAM and one of RAM for each stage."""
    plan = planned.plan
    cuda = plan.device == "cuda"
    most = max(plan.limit_bytes, plan.peak_bytes, *(stage.host_bytes for stage in plan.stages)) / GIB
    bottom = _HEIGHT - _BOTTOM
    axes = _Axes(draw, 0, _linear(0, len(plan.stages), _LEFT, _WIDTH - _RIGHT), _linear(0, 1.15 * most, bottom, _TOP))
    work = planned.workload
    title = f"{work.task} {work.height}x{work.width}, {work.frames} frames, {plan.weight_type} on {plan.device_name}"
    axes.text((_LEFT, 10), f"Memory over the run: {title}", size=14)
    for gib in _round_steps(most):
        axes.line([(_LEFT, axes.y(gib)), (_WIDTH - _RIGHT, axes.y(gib))], _GRID)
        axes.text((_LEFT - 8, axes.y(gib)), f"{gib:g}", _PALE, "rm")
    axes.text((_LEFT - 8, _TOP - 18), "GiB", _PALE, "rm")
    for place, stage in enumerate(plan.stages):
        left, width = axes.x(place), axes.x(1) - axes.x(0)
        columns = {"VRAM": _device_parts(planned, stage), "RAM": _host_parts(planned, stage)}
        for index, (name, parts) in enumerate(item for item in columns.items() if cuda or item[0] == "RAM"):
            start = left + width * ((0.16 if cuda else 0.35) + 0.36 * index)
            _stack(axes, start, start + 0.3 * width, name, parts)
        axes.text((left + width * 0.5, bottom + 20), f"{stage.name}, {duration(stage.seconds)}", anchor="ma")
    limit = axes.y(plan.limit_bytes / GIB)
    axes.dots((_LEFT, limit), (_WIDTH - _RIGHT, limit), _RED)
    memory = "VRAM" if cuda else "RAM"
    axes.text((_WIDTH - _RIGHT, limit - 4), f"{memory} that may be used: {plan.limit_bytes / GIB:.1f} GiB", _RED, "rs")
    at: float = _LEFT
    for name, color in _PARTS.items():
        if name == "blocks kept" and not plan.resident_blocks:
            continue
        axes.box(at, 36, at + 10, 46, color)
        axes.text((at + 14, 41), name, anchor="lm")
        at += 34 + 7 * len(name)


def _stack(axes: _Axes, left: float, right: float, name: str, parts: dict[str, int]) -> None:
    height = 0.0
    for part, nbytes in parts.items():
        axes.box(left, axes.y(height + nbytes / GIB), right, axes.y(height), _PARTS[part])
        height += nbytes / GIB
    middle = (left + right) / 2
    axes.text((middle, axes.y(height) - 3), f"{height:.1f}", anchor="ms")
    axes.text((middle, axes.y(0) + 3), name, _PALE, "ma", 11)


def _device_parts(planned: Planned, stage: StagePlan) -> dict[str, int]:
    return _parts(planned, stage, stage.device_bytes, CONTEXT_BYTES, planned.plan.ring_slots)


def _host_parts(planned: Planned, stage: StagePlan) -> dict[str, int]:
    if planned.plan.device != "cuda":
        return _parts(planned, stage, stage.host_bytes, PROCESS_BYTES, planned.plan.ring_slots)
    passing = staging_bytes(_block_bytes(planned, stage))
    rest = stage.host_bytes - PROCESS_BYTES - passing
    return {"system": PROCESS_BYTES, "blocks passing": passing, "activations": rest}


def _parts(planned: Planned, stage: StagePlan, total: int, system: int, slots: int) -> dict[str, int]:
    passing = slots * _block_bytes(planned, stage)
    kept = planned.plan.resident_blocks * planned.workload.block_bytes if stage.name in ("load", "denoise") else 0
    rest = total - system - passing - kept
    return {"system": system, "blocks passing": passing, "blocks kept": kept, "activations": rest}


def _block_bytes(planned: Planned, stage: StagePlan) -> int:
    work = planned.workload
    return {"text": work.text_block_bytes, "load": work.block_bytes, "denoise": work.block_bytes}.get(stage.name, 0)


def _round_steps(most: float) -> list[float]:
    step = next(step for step in (0.5, 1, 2, 4, 8, 16, 32, 64) if most / step <= 8)
    return [step * count for count in range(int(most / step) + 1)]


def _draw_steps(draw: ImageDraw.ImageDraw, planned: Planned) -> None:
    """Draw the time to compute and the time to read over the tokens. Beyond their crossing, reading is hidden."""
    hardware, work, plan = planned.hardware, planned.workload, planned.plan
    fast = plan.precision == "fast"
    few, many = 1000, 200_000
    counts = [few * (many / few) ** (step / 60) for step in range(61)]

    def computing(tokens: float) -> float:
        return step_time(
            hardware, with_tokens(work, round(tokens)), fast=fast, attention=plan.attention, dtype=plan.dtype
        ).compute

    reading = work.layers * work.block_bytes / hardware.disk_rate
    waits = {f"from the disk, {hardware.disk_rate / 1e9:g} GB/s": (reading, _RED)}
    if hardware.device == "cuda":
        link = work.layers * work.block_bytes / hardware.link_rate
        waits[f"over the link, {hardware.link_rate / 1e9:.0f} GB/s"] = (link, _GREEN)
    low, high = min(computing(few), *(wait for wait, _ in waits.values())) / 2, max(computing(many), reading) * 2
    top, bottom = _HEIGHT + _TOP, 2 * _HEIGHT - _BOTTOM
    axes = _Axes(draw, top, _logarithmic(few, many, _LEFT, _WIDTH - _RIGHT), _logarithmic(low, high, bottom, top))
    axes.text(
        (_LEFT, _HEIGHT + 10), f"Time of a step against its tokens: {plan.weight_type} on {plan.device_name}", size=14
    )
    _grid(axes, low, high, bottom)
    axes.line([(axes.x(n), axes.y(max(computing(n), *(wait for wait, _ in waits.values())))) for n in counts], _GRAY, 6)
    axes.line([(axes.x(n), axes.y(computing(n))) for n in counts], _BLUE, 2)
    axes.text((axes.x(5000) + 4, axes.y(computing(5000)) + 6), "computing", _BLUE)
    axes.text((_LEFT, _HEIGHT + 36), "gray: a step, which takes as long as the slowest of these", _PALE)
    for text, (wait, color) in waits.items():
        axes.line([(_LEFT, axes.y(wait)), (_WIDTH - _RIGHT, axes.y(wait))], color, 2)
        axes.text((_LEFT + 6, axes.y(wait) - 6), f"reading every block {text}", color, "ls")
    crossing = break_even_tokens(hardware, work, fast, plan.dtype, plan.attention)
    if few < crossing < many:
        axes.dots((axes.x(crossing), top), (axes.x(crossing), bottom), _INK)
        axes.text((axes.x(crossing) - 5, top + 2), f"hidden from {crossing} tokens on", anchor="ra")
    axes.dots((axes.x(work.tokens), top), (axes.x(work.tokens), bottom), _ORANGE)
    axes.text((axes.x(work.tokens) - 5, bottom - 30), f"this clip: {work.tokens}", _ORANGE, "rs")


def _grid(axes: _Axes, low: float, high: float, bottom: int) -> None:
    for seconds in (0.01, 0.1, 1, 10, 60, 600, 3600, 36_000, 360_000):
        if low < seconds < high:
            axes.line([(_LEFT, axes.y(seconds)), (_WIDTH - _RIGHT, axes.y(seconds))], _GRID)
            axes.text((_LEFT - 8, axes.y(seconds)), _short(seconds), _PALE, "rm")
    for tokens in (1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000):
        axes.line([(axes.x(tokens), axes.top), (axes.x(tokens), bottom)], _GRID)
        axes.text((axes.x(tokens), bottom + 6), f"{tokens // 1000} k", _PALE, "ma")
    axes.text((_WIDTH - _RIGHT, bottom + 22), "tokens", _PALE, "ra")


def _short(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds < 3600 else f"{seconds / 3600:g} h"
