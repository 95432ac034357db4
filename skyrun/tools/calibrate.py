"""Collect importance: run a model on some clips and sum the squares of the inputs of its linear layers."""

import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skyrun.errors import FAILED, MODEL_MISSING, SkyrunError
from skyrun.events import Event, LatentsReady, Progress, StageEnded, StageStarted, now
from skyrun.kernels.files.gguf_file import GGUFFile
from skyrun.media.image import open_image
from skyrun.models.folder import CONVERT, main_type, open_folder
from skyrun.models.identity import fingerprint
from skyrun.pipelines import PIPELINES
from skyrun.pipelines.state import RunState
from skyrun.planning.job import prepare
from skyrun.planning.model import published_spec
from skyrun.planning.problems import place_problems
from skyrun.planning.request import Request
from skyrun.presets.memory import CONTEXT_BYTES
from skyrun.quant.choose.importance import Importance, read_importance, write_importance
from skyrun.streaming.device import choose_device, out_of_memory_explained, peak_bytes, vram_limited
from skyrun.tasks import TASKS

# The tasks that need only prompts and images.
_TASKS = tuple(spec.name for spec in TASKS.values() if not (spec.video or spec.audio))
_STAGE = "calibrate"
_ROWS = 1024  # of activations that are squared at a time, to limit the memory


@dataclass(frozen=True)
class Clip:
    """A clip to run. label: a digest of everything that determines the clip, and the start of its prompt."""

    request: Request
    label: str


@dataclass(frozen=True)
class Calibration:
    """What to collect. origin: model and settings. model_type: type of its blocks. collected: what the file holds."""

    output: Path
    origin: str
    model_type: str
    clips: tuple[Clip, ...]
    collected: Importance

    @cached_property
    def pending(self) -> tuple[Clip, ...]:
        """The clips that are not in the file yet."""
        return tuple(clip for clip in self.clips if clip.label not in self.collected.samples)


def plan_calibration(
    model: Path | None, output: Path, prompts: Sequence[str], images: Sequence[Path], *, seed: int = 0, **settings: Any
) -> Calibration:
    """Check everything and list the clips: as many as there are prompts or images, whichever are more.

    Prompts and images are taken in turn. Clip k has 1 + k mod 4 images, if there are as many, and the seed `seed` + k.
    Raises SkyrunError if anything is not valid, or if `output` was collected from another model or with other settings.

    Args:
        model: A transformer's file, or a folder with one.
        output: The file to write or to extend.
        prompts: The prompts of the clips.
        images: The reference images of the clips.
        seed: The start of the first clip's noise.
        settings: Other arguments of the Request.
    """
    problems = [] if prompts else ["no prompt was given"]
    problems += place_problems(output)
    if output.suffix.lower() != ".gguf":
        problems.append(
            f"{output} does not end in .gguf; skyrun calibrate --merge F.gguf -o F.dat makes the other format"
        )
    if problems:
        raise SkyrunError.listing("importance cannot be collected", problems, "choose another -o, or give prompts")
    transformers = open_folder(model).transformers
    if not transformers:
        raise SkyrunError(f"{model} has no transformer", CONVERT, MODEL_MISSING)
    file = transformers[0]
    task = str(file.metadata.get("skyrun.task", _TASKS[0]))
    if task not in _TASKS:
        known = " and ".join(_TASKS)
        raise SkyrunError(f"{file.path} is a model for {task}, calibrate runs {known}", f"use a model for {known}")
    digests, most = _digests(images), TASKS[task].images[1]
    spec, _ = published_spec(file, TASKS[task])
    requests = []
    for k in range(max(len(prompts), len(images))):
        chosen = tuple(images[(k + n) % len(images)] for n in range(min(1 + k % most, len(images)) if most else 0))
        prompt = prompts[k % len(prompts)]
        request = Request(task, prompt, chosen, model=file.path, seed=seed + k, precision="exact", **settings)
        requests.append(request.of(spec))
    origin = _origin(file, requests[0])
    clips = tuple(Clip(request, _label(origin, request, digests)) for request in requests)
    collected = read_importance(output) if output.exists() else Importance()
    if collected.sums and collected.origin != origin:
        said = collected.origin or "unknown models or settings"
        hint = "choose another -o; files can be merged later with skyrun calibrate --merge"
        raise SkyrunError(f"{output} was collected from {said}; this is {origin}", hint)
    return Calibration(output, origin, main_type(file), clips, collected)


def _digests(images: Sequence[Path]) -> dict[Path, str]:
    """A digest of the pixels of each image."""
    digests, problems = {}, []
    for path in images:
        try:
            image = open_image(path)
            digests[path] = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        except SkyrunError as error:
            problems.append(error.message)
    if problems:
        raise SkyrunError.listing("these images cannot be used", problems, "use PNG, JPEG or WebP files")
    return digests


def _label(origin: str, request: Request, digests: Mapping[Path, str]) -> str:
    identity = json.dumps([origin, request.prompt, [digests[path] for path in request.images], request.seed])
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:16]} {request.prompt[:60]}"


def _origin(file: GGUFFile, request: Request) -> str:
    """The model, identified by its fingerprint, and the settings that all clips share."""
    name = file.metadata.get("general.name", "a model")
    shape = request.resolution if request.size is None else "x".join(map(str, request.size))
    settings = f"{shape}, {request.frame_count} frames, {request.steps} steps"
    return f"{name} {main_type(file)} ({fingerprint(file)}), {settings}"


def collect(calibration: Calibration) -> Generator[Event, None, Importance]:
    """Run the pending clips, and return everything that the file holds then.

    The file is written after each clip, so that an interrupted collection can be resumed.
    """
    start, total = now(), calibration.collected
    yield StageStarted(_STAGE, len(calibration.pending), "clips")
    for index, clip in enumerate(calibration.pending):
        sums, counts = yield from _observe(clip.request, index)
        added = Importance(sums, counts, calibration.origin, (clip.label,), 1)
        write_importance(calibration.output, total.merge(added))
        total = read_importance(calibration.output)  # rounded as after an interruption, so that the result is the same
        yield Progress(_STAGE, index + 1)
    device = choose_device(calibration.clips[0].request.device)
    yield StageEnded(_STAGE, now() - start, peak_bytes(device))
    return total


def collected_clips(calibration: Calibration) -> int:
    """How many of the clips the file holds now."""
    if not calibration.output.exists():
        return 0
    samples = read_importance(calibration.output).samples
    return sum(clip.label in samples for clip in calibration.clips)


def _observe(request: Request, index: int) -> Generator[Event, None, tuple[dict[str, Tensor], dict[str, int]]]:
    """Denoise one clip and return the sums and counts of the layers' inputs. Nothing is decoded."""
    job, squares = prepare(request), SumsOfSquares()
    with out_of_memory_explained(), vram_limited(job.device, job.plan.limit_bytes - CONTEXT_BYTES):
        for event in takewhile(
            lambda e: not isinstance(e, LatentsReady), PIPELINES[request.spec.pipeline](job, RunState(), squares)
        ):
            if isinstance(event, Progress) and event.stage == "denoise" and event.done < request.passes:
                yield Progress(_STAGE, index + event.done / request.passes)
    return squares.sums(), squares.counts


class SumsOfSquares:
    """Observes a stream: sums the squares of all rows per weight and input channel, on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, block: int, layer: str, x: Tensor) -> None:
        """Add the input x [..., cols] of the linear layer `layer` of a block."""
        name = f"blocks.{block}.{layer}.weight"
        rows = x.flatten(0, -2)
        parts = [part.float().square().sum(0, dtype=torch.float64) for part in rows.split(_ROWS)]
        total = torch.stack(parts).sum(0)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def sums(self) -> dict[str, Tensor]:
        """The sums by name, float64 [cols] on the CPU. Raises SkyrunError if an activation was infinite or NaN."""
        sums = {name: total.cpu() for name, total in self._sums.items()}
        broken = [name for name, total in sums.items() if not torch.isfinite(total).all()]
        if broken:
            message = f"the input of {broken[0]} and {len(broken) - 1} others became infinite or NaN"
            raise SkyrunError(message, "use --dtype bfloat16 or float32, or check the model", FAILED)
        return sums


def merge_files(paths: Sequence[Path], output: Path) -> Importance:
    """Merge several files into one, in the format that the suffix of `output` names."""
    merged = Importance()
    for path in paths:
        part = read_importance(path)
        try:
            merged = merged.merge(part)
        except SkyrunError as error:
            raise SkyrunError(f"{path} cannot be merged with those before it: {error.message}", error.hint) from error
    write_importance(output, merged)
    return merged
