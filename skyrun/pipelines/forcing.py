"""Diffusion forcing: clips of any length from a prompt, or from a first frame as well, window by window.

The transformer was trained with frames of different timesteps in one sequence, so what is given precedes the noisy
frames without noise, or nearly so: the first frame of the clip, and in later windows the last frames of the one before.
"""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from skyrun.events import Event, LatentsReady, WindowDone
from skyrun.media.pixels import Frames, first_frame, truncated
from skyrun.models.vae import LATENT_CHANNELS, groups_of
from skyrun.pipelines.conditioning import condition_of
from skyrun.pipelines.samplers import Staggered, new_sampler
from skyrun.pipelines.stages import decode, denoise, encode_clip, encode_prompts
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.streaming.stream import ObserveBlock

_OTHER = 1 << 62  # added to the seed for the noise of given frames, so that it is not that of the clip


@torch.inference_mode()
def diffusion_forcing(job: Job, state: RunState, observe: ObserveBlock | None = None) -> Iterator[Event]:
    """Run the stages, from "text" to "decode" of the last window."""
    yield from encode_prompts(job, state)
    if job.inputs.images and "image" not in state.encoded:
        frame, _ = first_frame(job.inputs.images[0], job.height, job.width, job.request.spec.image_fit)
        state.encoded["image"] = (yield from encode_clip(job.files.vae, [frame], job.plan, job.device)).cpu()
    for index in range(state.window, len(job.windows)):
        last = yield from _window(job, state, index, observe)
        if len(job.windows) > 1:
            state.finish_window(frames=last)
            yield WindowDone(index, len(job.windows))


def _window(job: Job, state: RunState, index: int, observe: ObserveBlock | None) -> Generator[Event, None, Tensor]:
    """Make one window and return its last frames, [3, T, H, W] in [-1, 1], from which the next one goes on."""
    plan, files, device, part = job.plan, job.files, job.device, job.part(index)
    history = job.request.condition_frames if index else 0
    given = state.encoded.get("image")
    if index:
        frames = state.carried["frames"]
        groups = (frames[:, group] for group in groups_of(frames.shape[1]))
        given = (yield from encode_clip(files.vae, groups, plan, device, part)).cpu()
    _begin(job, state, index)
    noise = _history_noise(job, index) if len(job.windows) > 1 and given is not None else None
    condition = condition_of(job, state, before=given, clean=given is not None, noise=noise, fps=job.fps)
    yield from denoise(files, plan, state, condition, device, observe, part)
    assert state.latents is not None
    whole = state.latents if given is None else torch.cat((given, state.latents), 1)
    if not state.groups:  # the first frame is one of the clip, the history is not
        yield LatentsReady(state.latents if index else whole, index)
    last = torch.empty(3, 0, job.height, job.width)

    def show(pixels: Tensor, first: int) -> Frames:
        nonlocal last
        pixels = pixels.clamp(-1, 1)
        last = torch.cat((last, pixels.float().cpu()), 1)[:, -job.request.condition_frames :]
        return truncated(pixels[:, max(0, history - first) :])

    yield from decode(files.vae, whole, state, plan, device, show, part)
    return last


def _begin(job: Job, state: RunState, index: int) -> None:
    """Draw the noise of a window unless it was begun before. One generator draws that of all windows, one by one."""
    if state.sampler is not None:
        return
    assert job.request.seed is not None
    generator = torch.Generator("cpu").manual_seed(job.request.seed)
    for window in job.windows[: index + 1]:
        shape = (LATENT_CHANNELS, window.others + window.latents, job.height // 8, job.width // 8)
        noise = torch.randn(shape, generator=generator)
    request, frames = job.request, job.windows[index].latents
    assert request.shift is not None
    if request.ar_step:
        state.sampler = Staggered(request.steps, request.shift, frames, request.ar_step)
    else:
        state.sampler = new_sampler(request.spec, request.steps, request.shift)
    state.latents = noise[:, job.windows[index].others :]


def _history_noise(job: Job, index: int) -> Tensor:
    """What the given frames of a window are noised with, a sample for every pass."""
    assert job.request.seed is not None
    generator = torch.Generator("cpu").manual_seed((job.request.seed ^ _OTHER) + index)
    shape = (job.request.passes, LATENT_CHANNELS, job.windows[index].others, job.height // 8, job.width // 8)
    return torch.randn(shape, generator=generator)
