"""Reference to video: make a clip from a prompt that shows what is in one to four reference images."""

from collections.abc import Iterator

import torch
from torch import Tensor

from skyrun.events import Event, LatentsReady
from skyrun.media.pixels import letterbox, to_pixels
from skyrun.models.vae import LATENT_CHANNELS
from skyrun.pipelines.conditioning import condition_of
from skyrun.pipelines.samplers import new_sampler
from skyrun.pipelines.stages import decode, denoise, encode_images, encode_prompts
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.planning.request import Request
from skyrun.streaming.stream import ObserveBlock
from skyrun.tasks.skyreels_v3 import MAX_REFERENCES


def draw_noise(request: Request) -> tuple[Tensor, list[Tensor]]:
    """Noise for the clip [16, F, h, w] and for each image [16, 1, h, w], drawn from one CPU generator in this order."""
    assert request.seed is not None and isinstance(request.size, tuple)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    rows, cols = (side // 8 for side in request.size)
    clip = torch.randn(LATENT_CHANNELS, request.latent_frames, rows, cols, generator=generator)
    return clip, [torch.randn(LATENT_CHANNELS, 1, rows, cols, generator=generator) for _ in request.images]


@torch.inference_mode()
def reference_to_video(job: Job, state: RunState, observe: ObserveBlock | None = None) -> Iterator[Event]:
    """Run the stages. Four references always follow the clip in the sequence; missing ones are zeros."""
    request, plan, files, device = job.request, job.plan, job.files, job.device
    noise, image_noise = draw_noise(request)
    yield from encode_prompts(job, state)
    if "pictures" not in state.encoded:
        pixels = [to_pixels(letterbox(image, job.height, job.width)) for image in job.inputs.images]
        references = yield from encode_images(files.vae, pixels, image_noise, plan, device)
        missing = [torch.zeros_like(references[0])] * (MAX_REFERENCES - len(references))
        state.encoded["pictures"] = torch.cat((*references, *missing), 1).cpu()
    if state.sampler is None:
        state.sampler, state.latents = new_sampler(request.spec, request.steps), noise
    condition = condition_of(job, state, after=state.encoded["pictures"])
    yield from denoise(files, plan, state, condition, device, observe)
    assert state.latents is not None
    if not state.groups:
        yield LatentsReady(state.latents)
    yield from decode(files.vae, state.latents, state, plan, device)
