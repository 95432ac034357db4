"""From a request to a job: check everything and decide everything before anything heavy begins."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from skyrun.device import choose_device
from skyrun.errors import WILL_NOT_FIT, SkyrunError
from skyrun.images import open_image
from skyrun.kernels.matmul import fast_gain
from skyrun.machine import this_machine
from skyrun.model_files import ModelFiles, find_model, main_type
from skyrun.models.dit import block_layouts, canonical_tensors, read_dims
from skyrun.models.umt5 import UMT5
from skyrun.models.vae import LATENT_CHANNELS, check_vae, read_vae_dims
from skyrun.presets import Plan, Workload, choose
from skyrun.presets.plan import EXACT_TYPES
from skyrun.request import MAX_REFERENCES, Request
from skyrun.sizes import bucket

_SEEDS = 1 << 32


@dataclass(frozen=True)
class Job:
    """A request that has passed every check, with all that was decided for it."""

    request: Request
    pictures: tuple[Image, ...]
    files: ModelFiles
    encoder: UMT5
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
    pictures, files = _open_inputs(request)
    assert not isinstance(request.size, str)
    height, width = request.size or bucket(request.resolution, pictures[0].height, pictures[0].width)
    request = replace(request, size=(height, width), frames=request.frame_count, seconds=None)
    encoder = UMT5(files.text_encoder)
    workload = _workload(request, files, encoder)
    plan = _plan(request, workload, device, files.transformer.path)
    if plan.problem:
        raise SkyrunError(
            f"{height}x{width} with {request.frame_count} frames will not fit: {plan.problem}",
            (f"{plan.remedy}: " if plan.remedy else "")
            + "use a smaller --resolution or --size, fewer --seconds, or raise --max-vram or --max-ram",
            WILL_NOT_FIT,
        )
    return Job(request, tuple(pictures), files, encoder, height, width, device, workload, plan)


def _plan(request: Request, workload: Workload, device: torch.device, model: Path) -> Plan:
    hardware = this_machine(device.type, model)
    if request.precision is None and workload.weight_type not in EXACT_TYPES:
        hardware = replace(hardware, fast_gain=fast_gain(device, workload.tokens, workload.dim))
    return choose(
        hardware,
        workload,
        precision=request.precision,
        dtype=request.dtype,
        max_vram=request.max_vram,
        max_ram=request.max_ram,
    )


def _open_inputs(request: Request) -> tuple[list[Image], ModelFiles]:
    """Pictures and model. What is wrong with any of them is in one error."""
    pictures, failures = [], []
    for path in request.images:
        try:
            pictures.append(open_image(path))
        except SkyrunError as error:
            failures.append(error)
    try:
        files = find_model(request.model, request.task, request.quant)
    except SkyrunError as error:
        failures.append(error)
    if not failures:
        parts = {path.resolve() for path in (files.transformer.path, files.text_encoder.path, files.vae)}
        for place in (request.output, request.save_latents):
            if place is not None and place.resolve() in parts:
                failures.append(SkyrunError(f"{place} is a file of the model, it would be lost", "choose another name"))
    if failures:
        first = failures[0]
        problems = [failure.message for failure in failures]
        raise SkyrunError.listing("this cannot be run", problems, first.hint, first.code)
    return pictures, files


def _workload(request: Request, files: ModelFiles, encoder: UMT5) -> Workload:
    """The numbers of the job, after a look at every tensor's shape."""
    dims = read_dims(files.transformer)
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
    assert isinstance(request.size, tuple)
    height, width = request.size
    tensors = canonical_tensors(files.transformer)
    vae_base_dim, vae_weights = read_vae_dims(files.vae)
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
        weight_type=main_type(files.transformer),
        block_bytes=max(block.nbytes for block in block_layouts(files.transformer)),
        outer_bytes=sum(info.nbytes for name, info in tensors.items() if not name.startswith("blocks.")),
        text_layers=encoder.layers,
        text_dim=encoder.dim,
        text_block_bytes=encoder.block_bytes,
        vae_base_dim=vae_base_dim,
        vae_weights=vae_weights,
        encoded_frames=len(request.images),
    )
