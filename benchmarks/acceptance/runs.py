"""Whole runs: memory under limits, too little of it, a kill, streaming against memory, and the built-in model."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from acceptance.models import model_name, random_clip
from acceptance.stand_ins import need
from acceptance.step import Figure, Scale
from skyrun.engine.clip import Result
from skyrun.engine.run import run_job
from skyrun.events import Event, Replanned, StageEnded, StageStarted, drain, listen
from skyrun.hub.built_in import CHECKPOINT
from skyrun.models import vae
from skyrun.models.dit import transformer
from skyrun.planning.job import Job, prepare
from skyrun.planning.request import Request
from skyrun.presets.memory import GIB
from skyrun.quant import convert
from skyrun.tools.bench.checks import relative_error
from skyrun.tools.bench.step import measure_step
from training.requests import drawn_request, latent_error, make, psnr

ROOT = Path(__file__).parent.parent.parent
_LIMITS = (24.0, 12.0, 8.0, 6.0)  # GiB
_BLOCKS, _STREAMED_BLOCKS = 2, 4
_SHORT = 0.9  # of what a stage needs
_EXACT, _ALIKE = 5e-3, 25.0  # relative error in float32, with convolutions in TF32; dB
_SAME = {True: 1e-4, False: 2e-2}  # by whether it is small: other parts of tokens and frames change the rounding


def limited_runs(scale: Scale) -> Iterator[Figure]:
    """Runs of the published shapes under --max-vram: every stage within it, and as planned."""
    with random_clip(scale, _BLOCKS) as request:
        for limit in scale.of(_LIMITS, (None,)):
            job = prepare(replace(request, max_vram=limit))
            planned = {stage.name: stage for stage in job.plan.stages}
            stages = _followed(job, lambda event: None)[1]
            for stage in stages:
                of_plan = planned.get(stage.stage)
                name = f"{stage.stage}, {limit or 'no'} GiB allowed"
                peak = stage.peak_bytes / GIB
                yield Figure(name, peak, "GiB", most=scale.on_card(limit) if limit else None)
                if of_plan is not None and of_plan.device_bytes:
                    least = 0.95 if stage.stage == "denoise" else None
                    yield Figure(name, stage.peak_bytes / of_plan.device_bytes, "/ planned", least, 1.05)


def _followed(job: Job, on: Callable[[Event], None]) -> tuple[Result, list[StageEnded]]:
    stages: list[StageEnded] = []

    def seen(event: Event) -> None:
        if isinstance(event, StageEnded):
            stages.append(event)
        on(event)

    return listen(run_job(job, keep_frames=False), seen), stages


def recovery(scale: Scale) -> Iterator[Figure]:
    """From the beginning of a stage there is a tenth less memory than it needs: the run goes on by a smaller plan."""
    clips = {"denoise": {}, "decode": {} if scale.small else {"frames": 5}}
    with random_clip(scale, _BLOCKS) as request:
        for stage, changes in clips.items():
            job = prepare(replace(request, **changes))
            whole, stages = _followed(job, lambda event: None)
            peak = max(ended.peak_bytes for ended in stages if ended.stage == stage)
            events: list[Event] = []
            with _shortage(scale, stage, _SHORT * peak) as begin:

                def on(event: Event, begin: Any = begin, events: Any = events) -> None:
                    begin(event)
                    if isinstance(event, Replanned):
                        events.append(event)

                result, _ = _followed(job, on)
            yield Figure(f"{stage}: smaller plans", len(events), least=1)
            error = relative_error(result.latents, whole.latents)
            yield Figure(f"{stage}: latents", error, "apart", most=_SAME[scale.small])


@contextmanager
def _shortage(scale: Scale, stage: str, nbytes: float) -> Iterator[Callable[[Event], None]]:
    """Yields what has to see the events of a run: memory is short from the beginning of the stage on.

    On a CPU one call of the model fails instead.
    """
    if scale.small:
        owner, name = {"denoise": (transformer, "dit_block"), "decode": (vae.WanVAE, "_decoder")}[stage]
        work, calls = getattr(owner, name), iter(range(1 << 20))

        def fails_once(*arguments: Any) -> Any:
            if next(calls) == 1:
                raise torch.OutOfMemoryError("made to fail")
            return work(*arguments)

        with patch.object(owner, name, fails_once):
            yield lambda event: None
        return
    total = torch.cuda.get_device_properties(scale.device).total_memory
    free, _ = torch.cuda.mem_get_info(scale.device)
    outside = total - free - torch.cuda.memory_reserved(scale.device)

    def begin(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == stage:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((nbytes - outside) / total, scale.device)

    yield begin


def streamed(scale: Scale) -> Iterator[Figure]:
    """A step streamed from disk against one from memory, and both against the plan."""
    clip = {"size": (32, 48), "frames": 5} if scale.small else {"resolution": "720P", "frames": 121}
    settings = {"steps": 3, "device": str(scale.device), **clip}
    with TemporaryDirectory() as folder:
        figures = drain(measure_step(Path(folder), model_name(scale), "Q8_0", _STREAMED_BLOCKS, settings, 1, run_job))
    yield Figure("step, streamed", figures.streamed, "s")
    yield Figure("step, streamed / from memory", figures.streamed / figures.resident, most=scale.on_card(1.03))
    planned = figures.plan.step_seconds / figures.streamed
    yield Figure("step, planned / measured", planned, "", scale.on_card(0.8), scale.on_card(1.25))
    if figures.plain_rate:
        # What the page cache holds is read more quickly than a disk gives: less than that is slow.
        yield Figure("read / plain read", figures.read_rate / figures.plain_rate)
    for stage in figures.stages:
        yield Figure(f"{stage.stage}, measured", stage.seconds, "s")
    for of_plan in figures.plan.stages:
        yield Figure(f"{of_plan.name}, planned", of_plan.seconds, "s")


def resumed(scale: Scale) -> Iterator[Figure]:
    """A run that is killed after its first step, gone on with, and one that nothing disturbs."""
    need("av", "ftfy", "gguf", "rich")  # of the command, which has no stand-ins
    with TemporaryDirectory() as place:
        folder = Path(place)
        request = _demo(scale, folder)
        pictures = [str(path) for path in request.images]
        command = [sys.executable, "-m", "skyrun", "run", "r2v", "-p", request.prompt, "--image", *pictures]
        command += [
            "--model",
            str(request.model),
            "--steps",
            str(request.steps),
            "--seed",
            "1",
            "--device",
            str(scale.device),
        ]
        whole, killed = folder / "whole", folder / "killed"
        _run([*command, "-o", f"{whole}.mp4", "--save-latents", f"{whole}.safetensors"])
        _kill_after_a_step([*command, "--json", "-o", f"{killed}.mp4", "--save-latents", f"{killed}.safetensors"])
        left = [file.name for file in folder.iterdir() if file.name.startswith("killed.skyrun.")]
        yield Figure("kept after the kill", " ".join(sorted(left)))
        _run([sys.executable, "-m", "skyrun", "resume", f"{killed}.mp4"])
        latents = [next(iter(load_file(f"{name}.safetensors").values())) for name in (killed, whole)]
        yield Figure("latents", relative_error(*latents), "apart", most=_SAME[scale.small])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-500:]}")


def _kill_after_a_step(command: Sequence[str]) -> None:
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if (event["event"], event.get("stage"), event.get("done")) == ("progress", "denoise", 1):
                break
        process.send_signal(signal.SIGKILL)


def built_in(scale: Scale) -> Iterator[Figure]:
    """The trained model that comes with skyrun, on the device against the CPU."""
    with TemporaryDirectory() as folder:
        request = _demo(scale, Path(folder))
        truth = make(replace(request, device="cpu", dtype="float32", precision="exact", attention="exact"))
        ways: dict[str, dict[str, Any]] = {"float32": {"dtype": "float32"}}
        ways |= {} if scale.small else {"as planned": {}}
        for name, changes in ways.items():
            made = make(replace(request, device=str(scale.device), **changes))
            error = latent_error(made.latents.cpu(), truth.latents)
            yield Figure(f"latents, {name}", error, "relative error", most=_EXACT if name == "float32" else None)
            yield Figure(f"frames, {name}", psnr(made.frames, truth.frames), "dB", least=_ALIKE)


def _demo(scale: Scale, folder: Path) -> Request:
    """A drawn request for the built-in model, which is converted to Q8_0."""
    convert(CHECKPOINT, folder / "model", "Q8_0")
    request = drawn_request(0, "card", folder)[1]
    return replace(request, model=folder / "model", steps=scale.of(request.steps, 2))
