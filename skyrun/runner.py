"""Run a request: check everything first, then make the clip, handing out events on the way."""

import json
import random
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from skyrun.device import choose_device, limit_vram, out_of_memory_explained, peak_bytes
from skyrun.errors import FAILED, WILL_NOT_FIT, SkyrunError
from skyrun.events import Event, FramesReady, LatentsReady, StageEnded, StageStarted, drain, now
from skyrun.images import open_image
from skyrun.kernels.atomic import replacing
from skyrun.model_files import ModelFiles, find_model, main_type
from skyrun.models.dit import block_layouts, canonical_tensors, read_dims
from skyrun.models.umt5 import UMT5
from skyrun.models.vae import LATENT_CHANNELS, check_vae, read_base_dim
from skyrun.pipelines.reference import reference_to_video
from skyrun.presets import Plan, Workload, choose, probe
from skyrun.request import FPS, MAX_REFERENCES, Request
from skyrun.sizes import bucket
from skyrun.video import writing_video

_SEEDS = 1 << 32


@dataclass(frozen=True)
class Result:
    """A finished clip.

    frames: uint8 [F, H, W, 3], empty if they were not kept. latents: float32 [C, F', h, w], normalised, before
    decoding. request: with the seed that was used. stages: what each took.
    """

    frames: np.ndarray[Any, np.dtype[np.uint8]]
    latents: Tensor
    fps: int
    request: Request
    plan: Plan
    stages: tuple[StageEnded, ...]

    @property
    def output(self) -> Path | None:
        """The mp4, if one was written."""
        return self.request.output


@dataclass(frozen=True)
class Job:
    """A request that has passed every check, with all that was decided for it."""

    request: Request
    files: ModelFiles
    height: int
    width: int
    device: torch.device
    workload: Workload
    plan: Plan

    def as_json(self) -> dict[str, Any]:
        """The decisions as plain values."""
        return {
            "request": self.request.as_json(),
            "size": [self.height, self.width],
            "frames": self.request.frame_count,
            "tokens": self.workload.tokens,
            "model": {
                "transformer": str(self.files.transformer.path),
                "type": main_type(self.files.transformer),
                "text_encoder": str(self.files.text_encoder.path),
                "vae": str(self.files.vae),
            },
            "plan": self.plan.as_json(),
        }


def prepare(request: Request) -> Job:
    """Open headers and pictures, decide sizes and the plan. No weights are read.

    Raises SkyrunError for anything wrong with the input; with exit code 4 if the model is missing, 3 if it won't fit.
    """
    if request.seed is None:
        request = replace(request, seed=random.SystemRandom().randrange(_SEEDS))
    device = choose_device(request.device)
    pictures = [open_image(path) for path in request.images]
    files = find_model(request.model, request.task, request.quant)
    height, width = request.size or bucket(request.resolution, pictures[0].height, pictures[0].width)
    request = replace(request, size=(height, width), frames=request.frame_count)
    workload = _workload(request, files, height, width)
    plan = choose(probe(device.type), workload, dtype=request.dtype, max_vram=request.max_vram, max_ram=request.max_ram)
    if plan.problem:
        raise SkyrunError(
            f"{height}x{width} with {request.frame_count} frames will not fit: {plan.problem}",
            "use a smaller --resolution or --size, fewer --seconds, or raise --max-vram or --max-ram",
            WILL_NOT_FIT,
        )
    return Job(request, files, height, width, device, workload, plan)


def _workload(request: Request, files: ModelFiles, height: int, width: int) -> Workload:
    dims, encoder = read_dims(files.transformer), UMT5(files.text_encoder)
    if encoder.dim != dims.text_dim:
        raise SkyrunError(
            f"{files.text_encoder.path} makes embeddings of {encoder.dim}, "
            f"{files.transformer.path} expects {dims.text_dim}",
            "use the text encoder that was converted with this model",
        )
    if dims.in_channels != LATENT_CHANNELS:
        raise SkyrunError(
            f"{files.transformer.path} takes {dims.in_channels} channels, reference to video has {LATENT_CHANNELS}",
            "use a SkyReels-V3 R2V model",
        )
    encoder.check()
    check_vae(files.vae)
    tensors = canonical_tensors(files.transformer)
    return Workload(
        task=request.task,
        height=height,
        width=width,
        frames=request.frame_count,
        latent_frames=request.latent_frames + MAX_REFERENCES,
        steps=request.steps,
        layers=dims.layers,
        dim=dims.dim,
        ffn_dim=dims.ffn_dim,
        block_bytes=max(block.nbytes for block in block_layouts(files.transformer, dims.layers)),
        outer_bytes=sum(info.nbytes for name, info in tensors.items() if not name.startswith("blocks.")),
        text_layers=encoder.layers,
        text_dim=encoder.dim,
        text_block_bytes=encoder.block_bytes,
        vae_base_dim=read_base_dim(files.vae),
    )


def run_job(job: Job, keep_frames: bool = True) -> Generator[Event, None, Result]:
    """Make the clip. Yields events; latents are saved before decoding, frames are written as they come."""
    request = job.request
    limit_vram(job.device, request.max_vram)
    kept, stages, latents = [], [], torch.empty(0)
    with out_of_memory_explained(), ExitStack() as stack:
        writer = None
        if request.output is not None:
            video = writing_video(request.output, job.height, job.width, FPS, request.as_json())
            writer = stack.enter_context(video)
        for event in reference_to_video(request, job.plan, job.files, job.height, job.width, job.device):
            if isinstance(event, LatentsReady):
                latents = event.latents
                if request.save_latents is not None:
                    _save_latents(request.save_latents, latents, request)
            elif isinstance(event, FramesReady):
                if writer is not None:
                    writer.add(event.frames)
                if keep_frames:
                    kept.append(event.frames)
            elif isinstance(event, StageEnded):
                stages.append(event)
            yield event
        if writer is not None:
            start = now()
            yield StageStarted("write", 1, "file")
            stack.close()
            yield StageEnded("write", now() - start, peak_bytes(job.device))
    frames = np.concatenate(kept) if kept else np.empty((0, job.height, job.width, 3), np.uint8)
    return Result(frames, latents, FPS, request, job.plan, tuple(stages))


def _save_latents(path: Path, latents: Tensor, request: Request) -> None:
    try:
        with replacing(path) as partial:
            save_file({"latents": latents.contiguous()}, partial, {"request": json.dumps(request.as_json())})
    except (OSError, SafetensorError) as error:
        raise SkyrunError(f"cannot write {path}: {error}", "check free space and permissions", FAILED) from error


def run(request: Request) -> Result:
    """Make a clip and wait for it. Raises SkyrunError; nothing half-written is left behind."""
    return drain(run_job(prepare(request)))
