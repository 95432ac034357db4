"""Text to video and image to video: make a clip of what a prompt says, from nothing or from its first frame."""

from collections.abc import Generator, Iterator
from typing import Any

import torch

from skyrun.events import Event, LatentsReady
from skyrun.media.pixels import first_frame, truncated
from skyrun.models.vae import LATENT_CHANNELS, groups_of
from skyrun.pipelines.conditioning import condition_of
from skyrun.pipelines.samplers import new_sampler
from skyrun.pipelines.stages import decode, denoise, embed_image, encode_clip, encode_prompts
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.streaming.stream import ObserveBlock
from skyrun.tasks.windows import FRAMES_PER_LATENT


@torch.inference_mode()
def text_to_video(job: Job, state: RunState, observe: ObserveBlock | None = None) -> Iterator[Event]:
    """Run the stages."""
    yield from encode_prompts(job, state)
    yield from _make(job, state, observe)


@torch.inference_mode()
def image_to_video(job: Job, state: RunState, observe: ObserveBlock | None = None) -> Iterator[Event]:
    """Run the stages. The image is the first frame of a gray video, whose latents the transformer sees beside its own.

    It is seen by CLIP as well.
    """
    assert job.vision is not None
    yield from encode_prompts(job, state)
    image, seen = first_frame(job.inputs.images[0], job.height, job.width, job.request.spec.image_fit)
    if "picture" not in state.encoded:
        state.encoded["picture"] = (yield from embed_image(job.vision, seen, job.device)).cpu()
    if "image" not in state.encoded:
        gray = torch.zeros(3, 1, job.height, job.width)
        frames = [image, *[gray] * (job.frames - 1)]  # one tensor, without copies
        clip = (torch.cat(frames[group], 1) for group in groups_of(job.frames))
        latents = (yield from encode_clip(job.files.vae, clip, job.plan, job.device)).cpu()
        given = torch.zeros(FRAMES_PER_LATENT, *latents.shape[1:])
        given[:, 0] = 1
        state.encoded["image"] = torch.cat((given, latents))
    yield from _make(job, state, observe, channels=state.encoded["image"], image=state.encoded["picture"])


def _make(job: Job, state: RunState, observe: ObserveBlock | None, **given: Any) -> Generator[Event, None, None]:
    """Denoise and decode. given: fields of the Condition."""
    request, plan, files, device = job.request, job.plan, job.files, job.device
    if state.sampler is None:
        assert request.seed is not None
        generator = torch.Generator("cpu").manual_seed(request.seed)
        shape = (LATENT_CHANNELS, job.windows[0].latents, job.height // 8, job.width // 8)
        state.sampler = new_sampler(request.spec, request.steps, request.shift)
        state.latents = torch.randn(shape, generator=generator)
    yield from denoise(files, plan, state, condition_of(job, state, **given), device, observe)
    assert state.latents is not None
    if not state.groups:
        yield LatentsReady(state.latents)
    yield from decode(files.vae, state.latents, state, plan, device, lambda pixels, _: truncated(pixels))
