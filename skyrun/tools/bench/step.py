"""Time denoising steps of a synthetic model of the real shapes, streamed from disk and from memory.

The pipeline is the one that makes clips. The weights are random, and the transformer has as many blocks as asked for.
The files are deleted at the end.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from skyrun.errors import FAILED, SkyrunError
from skyrun.events import Event, Progress, StageEnded, StageStarted, now
from skyrun.kernels.formats import FORMATS
from skyrun.models.umt5 import TEXT_LENGTH
from skyrun.models.vae import LATENT_CHANNELS
from skyrun.parallel.group import Group
from skyrun.pipelines.conditioning import Condition
from skyrun.pipelines.reference import reference_to_video
from skyrun.pipelines.samplers import UniPC
from skyrun.pipelines.stages import denoise
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job, prepare
from skyrun.planning.request import Request
from skyrun.presets import Plan
from skyrun.presets.machine.host import forget, free_space, read_rate
from skyrun.presets.memory import CONTEXT_BYTES
from skyrun.streaming.device import finish, out_of_memory_explained, vram_limited
from skyrun.tasks.skyreels_v3 import MAX_REFERENCES
from skyrun.tools.bench.synthetic_model import model_bytes, write_model
from skyrun.tools.calibration_prompts import draw_images
from skyrun.units import GIB

_SPARE = GIB  # bytes that stay free on the disk
_EXCHANGED, _EXCHANGES = 64 << 20, 8  # bytes that a device sends at a time, and how many times


@dataclass(frozen=True)
class StepFigures:
    """Figures of one bench. Steps in seconds, rates in bytes per second.

    stages: of the streamed run. streamed, resident: the median time of a step after the first. read_rate: of the stream
    while it was reading. plain_rate: of reading the same file with plain threads; 0 if the system cannot measure it.
    stalled: share of the time of the steps in which the model waited for weights. devices: how many made a clip
    together in a third run; together: the time of its steps.
    """

    tokens: int
    blocks: int
    plan: Plan
    stages: tuple[StageEnded, ...]
    streamed: float
    resident: float
    read_rate: float
    plain_rate: float
    stalled: float
    devices: int = 1
    together: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the ratios."""
        ratios = {
            "streamed_over_resident": self.streamed / self.resident,
            "read_over_plain": self.read_rate / self.plain_rate if self.plain_rate else None,
            "together_over_streamed": self.together / self.streamed if self.together is not None else None,
        }
        return asdict(self) | ratios


def measure_step(
    folder: Path,
    model: str,
    quant: str,
    blocks: int,
    settings: dict[str, Any],
    devices: int,
    make: Callable[[Job], Iterator[Event]],
) -> Generator[Event, None, StepFigures]:
    """Write a model below a folder, run it streamed and from memory, then on several devices, and delete it.

    SkyrunError if the disk is too small or the plan does not fit.

    Args:
        folder: On the disk to read from.
        model: A name in synthetic_model.MODELS.
        quant: The type of the transformer's blocks.
        blocks: How many blocks the transformer has.
        settings: Other arguments of the Request.
        devices: How many make a clip together in a third run; 1 does without it.
        make: Makes the clip of a job on several devices.
    """
    if settings.get("steps", 8) < 2 or blocks < 1:
        raise SkyrunError("one step cannot be compared with another", "use --steps 2 or more, and at least one block")
    if quant not in FORMATS or FORMATS[quant].block_size == 1:
        raise SkyrunError(f"{quant} is not a quantized type", "use Q2_K ... Q8_0")
    total = model_bytes(model, quant, blocks)
    if (free := free_space(folder)) < total + _SPARE:
        raise SkyrunError(
            f"the model takes {total / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free", "use fewer --blocks", FAILED
        )
    with TemporaryDirectory(prefix="skyrun-bench-", dir=folder) as place:
        yield from _written(Path(place), model, quant, blocks, total)
        images = draw_images(Path(place))[:1]
        task = model.split("-")[0]
        request = Request(task, "a person at the sea", images, model=Path(place), seed=0, **settings)
        several = prepare(replace(request, devices=devices))
        figures = yield from _both_runs(prepare(request), blocks)
        if devices == 1:
            return figures
        streaming = replace(several, plan=replace(several.plan, resident_blocks=0))
        _, together = yield from _timed(make(streaming))
        return replace(figures, devices=devices, together=together)


def _written(folder: Path, model: str, quant: str, blocks: int, total: int) -> Generator[Event, None, None]:
    start, done = now(), 0
    yield StageStarted("model", total, "bytes")
    for nbytes in write_model(folder, model, quant, blocks):
        done += nbytes
        yield Progress("model", done)
    yield StageEnded("model", now() - start)


def _both_runs(job: Job, blocks: int) -> Generator[Event, None, StepFigures]:
    path = job.files.transformer.path
    plain = read_rate(path, direct=False)
    forget(path)
    with out_of_memory_explained(), vram_limited(job.device, job.plan.limit_bytes - CONTEXT_BYTES):
        streaming = replace(job, plan=replace(job.plan, resident_blocks=0))
        stages, streamed = yield from _timed(reference_to_video(streaming, RunState()))
    with out_of_memory_explained():
        _, resident = yield from _timed(_from_memory(job))
    denoising = next(stage for stage in stages if stage.stage == "denoise")
    rate = denoising.bytes_read / max(denoising.read_seconds, 1e-9)
    stalled = denoising.stall_seconds / denoising.seconds
    return StepFigures(
        job.workload.tokens, blocks, streaming.plan, tuple(stages), streamed, resident, rate, plain, stalled
    )


def measure_exchange(group: Group, send: Callable[[Any], None]) -> float:
    """On every worker: bytes per second that a device sends to the others while it receives as many."""
    parts = torch.empty(group.size * (_EXCHANGED // group.size), dtype=torch.uint8, device=group.device)
    counts = [len(parts) // group.size] * group.size
    group.exchange(parts, counts, counts).wait()
    finish(group.device)
    start = now()
    for _ in range(_EXCHANGES):
        group.exchange(parts, counts, counts).wait()
    finish(group.device)
    return _EXCHANGES * (len(parts) - counts[0]) / (now() - start)


def _timed(events: Iterator[Event]) -> Generator[Event, None, tuple[list[StageEnded], float]]:
    """The stages that ended, and the median time of a denoising step after the first."""
    stages, marks = [], []
    for event in events:
        if isinstance(event, StageEnded):
            stages.append(event)
        if isinstance(event, Progress) and event.stage == "denoise":
            marks.append(now())
        yield event
    return stages, median(after - before for before, after in zip(marks, marks[1:], strict=False))


@torch.inference_mode()
def _from_memory(job: Job) -> Generator[Event, None, None]:
    """Only denoise, with every block in memory."""
    request, device = job.request, job.device
    plan = replace(job.plan, resident_blocks=job.workload.layers)
    rows, cols = job.height // 8, job.width // 8
    noise = torch.randn(LATENT_CHANNELS, request.latent_frames, rows, cols, device=device)
    references = torch.zeros(LATENT_CHANNELS, MAX_REFERENCES, rows, cols, device=device)
    condition = Condition(torch.randn(TEXT_LENGTH, job.encoder.dim), after=references)
    state = RunState(latents=noise, sampler=UniPC(request.steps, 5.0))
    yield from denoise(job.files, plan, state, condition, device)
