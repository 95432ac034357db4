"""`skyrun bench step`: a model of real shapes runs in the memory it is given, streamed from disk and from memory.

The pipeline is the one that makes clips; only the numbers are random, and the transformer has as many blocks as asked
for. The files are deleted at the end.
"""

import os
import shutil
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from skyrun.errors import FAILED, SkyrunError
from skyrun.events import Event, Progress, StageEnded, now
from skyrun.kernels.formats import FORMATS
from skyrun.models.umt5 import TEXT_LENGTH
from skyrun.models.vae import LATENT_CHANNELS
from skyrun.pipelines.conditioning import Condition
from skyrun.pipelines.reference import reference_to_video
from skyrun.pipelines.samplers import UniPC
from skyrun.pipelines.stages import denoise
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job, prepare
from skyrun.planning.request import Request
from skyrun.presets import Plan
from skyrun.presets.memory import CONTEXT_BYTES
from skyrun.streaming.device import out_of_memory_explained, vram_limited
from skyrun.tasks.skyreels_v3 import MAX_REFERENCES
from skyrun.tools.bench.synthetic_model import model_bytes, write_model
from skyrun.tools.calibration_prompts import draw_pictures

_READERS, _CHUNK = 8, 4 << 20  # of the plain read that the stream is compared with
_SPARE = 1 << 30  # bytes left free on the disk


@dataclass(frozen=True)
class StepFigures:
    """What was measured. Steps in seconds, rates in bytes per second.

    stages: of the streamed run. streamed, resident: the median step after the first. read_rate: of the stream while it
    read; plain_rate: of reading the same file with plain threads. stalled: share of the steps' time that the model
    waited for weights.
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

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the two ratios that matter."""
        ratios = {
            "streamed_over_resident": self.streamed / self.resident,
            "read_over_plain": self.read_rate / self.plain_rate,
        }
        return asdict(self) | ratios


def measure_step(
    folder: Path,
    model: str,
    quant: str,
    blocks: int,
    settings: dict[str, Any],
    on_written: Callable[[int, int], None] = lambda done, total: None,
) -> Generator[Event, None, StepFigures]:
    """Write the model below `folder`, run it twice, delete it. settings: what else a Request takes.

    on_written: is told how many bytes of how many are written. Raises SkyrunError if the disk is too small or the plan
    does not fit.
    """
    if settings.get("steps", 8) < 2 or blocks < 1:
        raise SkyrunError("one step cannot be compared with another", "use --steps 2 or more, and at least one block")
    if quant not in FORMATS or FORMATS[quant].block_size == 1:
        raise SkyrunError(f"{quant} is no quantized type", "use Q2_K ... Q8_0")
    total = model_bytes(model, quant, blocks)
    if (free := shutil.disk_usage(folder).free) < total + _SPARE:
        raise SkyrunError(
            f"the model takes {total / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free", "use fewer --blocks", FAILED
        )
    with TemporaryDirectory(prefix="skyrun-bench-", dir=folder) as place:
        written = 0

        def count(nbytes: int) -> None:
            nonlocal written
            written += nbytes
            on_written(written, total)

        write_model(Path(place), model, quant, blocks, count)
        pictures = draw_pictures(Path(place))[:1]
        task = model.split("-")[0]
        job = prepare(Request(task, "a person at the sea", pictures, model=Path(place), seed=0, **settings))
        path = job.files.transformer.path
        plain = _plain_rate(path)
        _forget(path)
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


def _timed(events: Any) -> Generator[Event, None, tuple[list[StageEnded], float]]:
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
    """The denoising alone, every block in memory."""
    request, device = job.request, job.device
    plan = replace(job.plan, resident_blocks=job.workload.layers)
    rows, cols = job.height // 8, job.width // 8
    noise = torch.randn(LATENT_CHANNELS, request.latent_frames, rows, cols, device=device)
    references = torch.zeros(LATENT_CHANNELS, MAX_REFERENCES, rows, cols, device=device)
    condition = Condition(torch.randn(TEXT_LENGTH, job.encoder.dim), after=references)
    state = RunState(latents=noise, sampler=UniPC(request.steps, 5.0))
    yield from denoise(job.files.transformer, plan, state, condition, device)


def _plain_rate(path: Path) -> float:
    """Bytes per second of reading a file once in large pieces with several threads, nothing of it cached before."""
    _forget(path)
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(_READERS) as threads:
        start = now()
        read = threads.map(lambda at: len(os.pread(file.fileno(), _CHUNK, at)), range(0, size, _CHUNK))
        return sum(read) / (now() - start)


def _forget(path: Path) -> None:
    """Ask the system to drop a file from its cache, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
