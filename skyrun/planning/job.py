"""From a request to a job: check everything and decide everything before anything heavy begins."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from skyrun.errors import WILL_NOT_FIT, SkyrunError
from skyrun.kernels.matmul import fast_gain
from skyrun.models.clip import CLIPVision
from skyrun.models.dit_header import DiTDims, block_layouts, canonical_tensors, read_dims
from skyrun.models.folder import ModelFiles, find_model, main_type, transformers_in
from skyrun.models.umt5 import UMT5
from skyrun.models.vae import LATENT_CHANNELS, check_vae, read_vae_dims
from skyrun.planning.hardware import this_machine
from skyrun.planning.inputs import Inputs, clip_size, open_inputs
from skyrun.planning.request import TEXT_LENGTH, Request
from skyrun.presets import Candidate, Plan, Workload, choose
from skyrun.presets.plan import EXACT_TYPES
from skyrun.streaming.device import choose_device
from skyrun.tasks.skyreels_v3 import TASKS
from skyrun.tasks.windows import Window, amounts, frame_count, windows_of

_SEEDS = 1 << 32
_MASK_CHANNELS = 4  # of a talking avatar: which frames of its condition are given


@dataclass(frozen=True)
class Job:
    """A request that has passed every check, with all that was decided for it. frames: of the clip."""

    request: Request
    inputs: Inputs
    files: ModelFiles
    encoder: UMT5
    vision: CLIPVision | None
    height: int
    width: int
    frames: int
    windows: tuple[Window, ...]
    device: torch.device
    workload: Workload
    plan: Plan

    @property
    def fps(self) -> int:
        """Frames per second of the clip."""
        return TASKS[self.request.task].fps

    def part(self, index: int) -> tuple[int, int] | None:
        """Which window of how many it is, counted from 1, for a person; None if there is only one."""
        return (index + 1, len(self.windows)) if len(self.windows) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """The decisions as plain values."""
        return {
            "request": self.request.as_json(),
            "size": [self.height, self.width],
            "frames": self.frames,
            "windows": len(self.windows),
            "tokens": self.workload.tokens,
            "model": {
                "type": main_type(self.files.transformer),
                **{name.replace(" ", "_"): str(path) for name, path in self.files.parts.items()},
            },
            "plan": self.plan.as_json(),
            "notices": list(self.inputs.notices),
        }


def prepare(request: Request) -> Job:
    """Open headers, pictures, video and speech, decide sizes and the plan. No weights are read.

    Raises SkyrunError for anything wrong with the input; with exit code 4 if the model is missing, 3 if it won't fit.
    """
    if request.seed is None:
        request = replace(request, seed=random.SystemRandom().randrange(_SEEDS))
    device = choose_device(request.device)
    inputs, files = _open(request)
    height, width = clip_size(request, *inputs.shape)
    request = replace(request, size=(height, width))
    if TASKS[request.task].frames:
        request = replace(request, frames=request.frame_count, seconds=None)
    windows = windows_of(request, frame_count(len(inputs.speech)) if inputs.speech is not None else 0)
    frames = sum(window.frames for window in windows)
    encoder, vision = UMT5(files.text_encoder), CLIPVision(files.image_encoder) if files.image_encoder else None
    dims = _check_model(request, files, encoder, vision)
    workload = _workload(request, files, encoder, vision, dims, windows)
    candidates = _candidates(request)
    plan = _plan(request, replace(workload, candidates=candidates), device, files.transformer.path)
    if candidates:  # what was chosen now stays chosen when the run goes on
        request = replace(request, quant=plan.weight_type)
    if plan.weight_type != workload.weight_type:  # another file of the folder suits this machine better
        files = find_model(request.model, request.task, plan.weight_type)
        dims = _check_model(request, files, encoder, vision)
        workload = _workload(request, files, encoder, vision, dims, windows)
    if plan.problem:
        raise SkyrunError(
            f"{height}x{width} with {frames} frames will not fit: {plan.problem}",
            (f"{plan.remedy}: " if plan.remedy else "")
            + "use a smaller --resolution or --size, fewer --seconds, or raise --max-vram or --max-ram",
            WILL_NOT_FIT,
        )
    return Job(request, inputs, files, encoder, vision, height, width, frames, windows, device, workload, plan)


def _candidates(request: Request) -> tuple[Candidate, ...]:
    """The transformers of a folder that the plan may choose from; none if there is one, or one was named."""
    if request.quant is not None or request.model is None or not request.model.is_dir():
        return ()
    files = transformers_in(request.model, request.task)
    sizes = {main_type(file): max(block.nbytes for block in block_layouts(file)) for file in files}
    return tuple(Candidate(*size) for size in sizes.items()) if len(sizes) > 1 else ()


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


def _open(request: Request) -> tuple[Inputs, ModelFiles]:
    """What the clip is made from, and the model. What is wrong with any of it is in one error."""
    failures: list[SkyrunError] = []
    inputs = open_inputs(request, failures)
    try:
        files = find_model(request.model, request.task, request.quant)
    except SkyrunError as error:
        failures.append(error)
    if not failures:
        parts = {path.resolve() for path in files.parts.values()}
        for place in (request.output, request.save_latents):
            if place is not None and place.resolve() in parts:
                failures.append(SkyrunError(f"{place} is a file of the model, it would be lost", "choose another name"))
    if failures:
        first = failures[0]
        problems = [failure.message for failure in failures]
        raise SkyrunError.listing("this cannot be run", problems, first.hint, first.code)
    return inputs, files


def _check_model(request: Request, files: ModelFiles, encoder: UMT5, vision: CLIPVision | None) -> DiTDims:
    """Look at every tensor's shape. SkyrunError if the files do not fit the task or each other."""
    dims = read_dims(files.transformer)
    if encoder.dim != dims.text_dim:
        raise SkyrunError(
            f"{files.text_encoder.path} makes embeddings of {encoder.dim}, "
            f"{files.transformer.path} expects {dims.text_dim}",
            "use the text encoder that was converted with this model",
        )
    channels = LATENT_CHANNELS if request.task != "a2v" else 2 * LATENT_CHANNELS + _MASK_CHANNELS
    if dims.in_channels != channels or bool(dims.image_dim) != (request.task == "a2v"):
        raise SkyrunError(
            f"{files.transformer.path} takes {dims.in_channels} channels, {request.task} has {channels}",
            f"use a SkyReels-V3 model for {request.task}",
        )
    if vision is not None and vision.dim != dims.image_dim:
        raise SkyrunError(
            f"{vision.file.path} makes tokens of {vision.dim}, {files.transformer.path} expects {dims.image_dim}",
            "use the image encoder that was converted with this model",
        )
    encoder.check()
    check_vae(files.vae)
    if vision is not None:
        vision.check()
    return dims


def _workload(
    request: Request,
    files: ModelFiles,
    encoder: UMT5,
    vision: CLIPVision | None,
    dims: DiTDims,
    windows: tuple[Window, ...],
) -> Workload:
    """The numbers of the job."""
    assert isinstance(request.size, tuple)
    height, width = request.size
    tensors = canonical_tensors(files.transformer)
    vae_base_dim, vae_weights = read_vae_dims(files.vae)
    return Workload(
        task=request.task,
        height=height,
        width=width,
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
        image_layers=vision.layers if vision else 0,
        image_block_bytes=vision.block_bytes if vision else 0,
        context_tokens=TEXT_LENGTH + (vision.tokens if vision else 0),
        vae_base_dim=vae_base_dim,
        vae_weights=vae_weights,
        **amounts(request.task, windows, request.condition_frames, len(request.images), request.window_frames),  # type: ignore[arg-type]
    )
