"""Plans, results and descriptions as text for people."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrun.kernels.formats import FORMATS
from skyrun.models.umt5 import TEXT_LENGTH
from skyrun.units import duration, size, table

if TYPE_CHECKING:
    from skyrun.engine.run import Result
    from skyrun.pipelines.state import RunState
    from skyrun.planning.job import Job
    from skyrun.presets import Plan
    from skyrun.quant.compare import TensorError
    from skyrun.quant.importance import Importance
    from skyrun.quant.plan import Conversion
    from skyrun.tools.calibrate import Calibration

_GIB = 1 << 30
_LONG = 2000  # a prompt is shorter, a tokenizer longer


def plan_text(job: "Job") -> str:
    """What will run, and what each stage will take."""
    plan, request = job.plan, job.request
    length = job.frames / job.fps
    windows = f" in {len(job.windows)} windows" if len(job.windows) > 1 else ""
    blocks = f"{plan.resident_blocks} of {job.workload.layers} blocks stay in memory, the others are streamed from disk"
    if plan.resident_blocks == job.workload.layers:
        blocks = "all blocks stay in memory"
    head = [
        f"{request.task}: {job.height}x{job.width} (height x width), {job.frames} frames ({length:.1f} s){windows}, "
        f"{request.steps} steps, {job.workload.tokens} tokens, seed {request.seed}",
        f"{job.files.transformer.path.name} on {plan.device_name}, {_numbers(plan)} (decoding in {plan.vae_dtype})",
        blocks,
        *_passing(plan),
        *job.inputs.notices,
        f"estimated memory, {plan.limit_bytes / _GIB:.1f} GiB may be used, and time, {duration(plan.seconds)} in all:",
    ]
    columns = ["VRAM GiB", "RAM GiB"] if plan.device == "cuda" else ["RAM GiB"]
    tokens = job.encoder.token_count(request.prompt)
    if tokens > TEXT_LENGTH:
        head.insert(1, f"the prompt has {tokens} tokens, the model reads {TEXT_LENGTH}: its end is cut off")
    rows = [["  stage", *columns, "time"]]
    for stage in plan.stages:
        sizes = [stage.device_bytes, stage.host_bytes] if plan.device == "cuda" else [stage.host_bytes]
        rows.append([f"  {stage.name}", *(f"{nbytes / _GIB:.2f}" for nbytes in sizes), duration(stage.seconds)])
    return "\n".join([*head, table(rows)])


def _passing(plan: "Plan") -> list[str]:
    if plan.token_rows is None:
        return []
    waiting = ", the others wait on the host" if plan.parked_tokens else ""
    return [f"{plan.token_rows} tokens pass through a block at a time{waiting}"]


def state_text(job: "Job", state: "RunState") -> str:
    """What an earlier run has finished."""
    windows = f"{state.window} of {len(job.windows)} windows" if state.window else ""
    if windows and not state.steps:
        return f"{windows} were finished before: going on from there"
    if windows:
        return f"{windows} and {state.steps} steps of the next were finished before: going on from there"
    if state.steps >= job.request.steps:
        return "denoising was finished before: what is left is decoding"
    if state.steps:
        return f"{state.steps} of {job.request.steps} steps were finished before: going on from there"
    return "an earlier run finished no step: going on with its seed"


def _numbers(plan: "Plan") -> str:
    return f"{plan.dtype} and int8 (--exact does without)" if plan.precision == "fast" else plan.dtype


def result_text(result: "Result") -> str:
    """Where the clip is, and where the time went."""
    total = sum(stage.seconds for stage in result.stages)
    lines = [f"{result.output} in {duration(total)}"]
    denoising = [stage for stage in result.stages if stage.stage == "denoise"]
    nbytes, seconds = (sum(getattr(s, name) for s in denoising) for name in ("bytes_read", "read_seconds"))
    if seconds:
        hidden = 1 - min(1.0, sum(stage.stall_seconds for stage in denoising) / seconds)
        lines.append(
            f"streamed {size(nbytes)} of weights at {nbytes / seconds / 1e9:.2f} GB/s, "
            f"{hidden:.0%} of it behind the computation"
        )
    return "\n".join(lines)


def conversion_text(conversion: "Conversion") -> str:
    """The files that will be written, with sizes, types, expected errors, and what could not be as asked."""
    rows = [("found", "file", "size", "error", "types")]
    notes = []
    for file in conversion.files:
        summary = file.summary()
        types = ", ".join(f"{count} {name}" for name, count in summary["types"].items())
        found = f"{file.task} {file.role.replace('_', ' ')}".strip()
        error = f"{file.error:.2%}{' *' * file.weighted}" if file.errors else "-"
        rows.append((found, str(file.path), size(file.nbytes), error, types))
        reasons: dict[str, list[str]] = {}
        for name, why in summary["fallbacks"].items():
            reasons.setdefault(why, []).append(name)
        notes += [f"{len(names)} matrices are F16: {why}; {names[0]}, ..." for why, names in reasons.items()]
    if any(file.errors for file in conversion.files):
        notes.append("(error: how far the outputs of matrices will be off, relative to them; from a sample of rows)")
    if any(file.weighted for file in conversion.files):
        notes.append("* weighted by importance: not to be compared with an error that is not")
    return "\n".join([table(rows), *notes, *conversion.notes])


def errors_text(errors: "Sequence[TensorError]") -> str:
    """The error of every tensor that has one, worst first."""
    worst = sorted((error for error in errors if error.error), key=lambda error: -error.error)
    same = len(errors) - len(worst)
    rows = [("tensor", "type", "error", "largest")]
    rows += [(error.name, error.type, f"{error.error:.3%}", f"{error.largest:.3g}") for error in worst]
    lines = [table(rows)] if worst else []
    if worst:
        weights = sum(error.weights for error in worst)
        total = (sum(error.weights * error.error**2 for error in worst) / weights) ** 0.5
        lines.append(f"{total:.3%} over all of these, each counting by its weights")
    return "\n".join([*lines, f"{same} of {len(errors)} tensors are exactly the source's"])


def calibration_text(calibration: "Calibration") -> str:
    """What will be collected, and what of it is there already."""
    total, pending = len(calibration.clips), len(calibration.pending)
    lines = [calibration.origin]
    if pending < total:
        lines.append(f"{total - pending} of {total} clips are in {calibration.output} already")
    if FORMATS[calibration.model_type].bits_per_weight < FORMATS["Q8_0"].bits_per_weight:
        lines.append(f"the model is {calibration.model_type}: its errors are measured too, Q8_0 or BF16 is better")
    return "\n".join(lines)


def importance_text(path: Path, importance: "Importance") -> str:
    """What a file of importance holds."""
    rows = max(importance.counts.values())
    return f"{path}: {len(importance.sums)} weights, {importance.chunks} clips, up to {rows} rows each"


def description_text(description: dict[str, Any]) -> str:
    """A description of a file, as `skyrun info` prints it; errors of tensors have a text of their own."""
    lines = [f"{description['path']}: {description['kind']}, {size(description['bytes'])}"]
    for title, values in description.items():
        if isinstance(values, dict) and values:
            lines.append(f"{title.replace('_', ' ')}:")
            lines += [f"  {name}: {_shown(value)}" for name, value in values.items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{part} {name}" if isinstance(part, int) else f"{name} {part}" for name, part in value.items()
        )
    text = str(value)
    text = text if text.isprintable() else json.dumps(text)  # line breaks and escapes would not stay in their line
    return text if len(text) <= _LONG else f"{text[:80]}... ({len(text)} characters)"
