"""What comes after a video: it goes on, window by window, or the next shot follows a cut.

Both are conditioned on the last frames before them. A prompt tags the kind of cut.
"""

from collections import deque
from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch import Tensor

from skyrun.events import Event, LatentsReady, WindowDone
from skyrun.media.pixels import Frames, from_uint8, truncated
from skyrun.media.video_reader import nearest
from skyrun.models.vae import LATENT_CHANNELS, groups_of
from skyrun.pipelines.conditioning import condition_of
from skyrun.pipelines.samplers import new_sampler
from skyrun.pipelines.stages import decode, denoise, encode_clip, encode_prompts
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.streaming.stream import ObserveBlock

_POSITION = 1024  # of the frames before the cut on the time axis, where the new frames begin at 0


@torch.inference_mode()
def video_extension(job: Job, state: RunState, observe: ObserveBlock | None = None) -> Iterator[Event]:
    """Run the stages, from "text" to "decode" of the last window."""
    yield from encode_prompts(job, state)
    for index in range(state.window, len(job.windows)):
        last = yield from _window(job, state, index, observe)
        if len(job.windows) > 1:
            state.finish_window(frames=torch.from_numpy(last))
            yield WindowDone(index, len(job.windows))


def _window(job: Job, state: RunState, index: int, observe: ObserveBlock | None) -> Generator[Event, None, Frames]:
    """Make one window and return its last frames, from which the next window continues.

    The frames before it precede the noisy ones in the sequence, without noise. They are decoded again with the window,
    but are not part of its output.
    """
    plan, files, device = job.plan, job.files, job.device
    part, before = job.part(index), _before(job, state)
    groups = (from_uint8(before[group]) for group in groups_of(len(before)))
    prefix = (yield from encode_clip(files.vae, groups, plan, device, part)).cpu()
    begin(job, state, index)
    condition = condition_of(job, state, before=prefix, clean=True)
    yield from denoise(files, plan, state, condition, device, observe, part)
    assert state.latents is not None
    if not state.groups:
        yield LatentsReady(state.latents, index)
    last: deque[Frames] = deque(maxlen=len(before))

    def show(pixels: Tensor, first: int) -> Frames:
        frames = truncated(pixels)[max(0, len(before) - first) :]
        last.extend(frames)
        return frames

    yield from decode(files.vae, torch.cat((prefix, state.latents), 1), state, plan, device, show, part)
    return np.stack(last)


@torch.inference_mode()
def shot_switching(job: Job, state: RunState, observe: ObserveBlock | None = None) -> Iterator[Event]:
    """Run the stages. Frames before the cut follow the new ones in the sequence, without noise, far away in time."""
    plan, files, device = job.plan, job.files, job.device
    assert job.inputs.footage is not None
    yield from encode_prompts(job, state)
    if "video" not in state.encoded:
        frames = nearest(job.inputs.footage.frames, job.height, job.width)
        groups = (from_uint8(frames[group]) for group in groups_of(len(frames)))
        state.encoded["video"] = (yield from encode_clip(files.vae, groups, plan, device)).cpu()
    begin(job, state, 0)
    condition = condition_of(job, state, after=state.encoded["video"], clean=True, after_position=_POSITION)
    yield from denoise(files, plan, state, condition, device, observe)
    assert state.latents is not None
    if not state.groups:
        yield LatentsReady(state.latents)
    yield from decode(files.vae, state.latents, state, plan, device, lambda pixels, _: truncated(pixels))


def begin(job: Job, state: RunState, index: int) -> None:
    """Draw the noise of a window unless the window was begun before. Every window starts from the same seed."""
    if state.sampler is None:
        assert job.request.seed is not None
        generator = torch.Generator("cpu").manual_seed(job.request.seed)
        shape = (LATENT_CHANNELS, job.windows[index].latents, job.height // 8, job.width // 8)
        state.sampler = new_sampler(job.request.spec, job.request.steps)
        state.latents = torch.randn(shape, generator=generator)


def _before(job: Job, state: RunState) -> Frames:
    """The frames that a window continues: the last ones of the window before it, or of the video."""
    if "frames" in state.carried:
        return state.carried["frames"].numpy()
    assert job.inputs.footage is not None
    return nearest(job.inputs.footage.frames, job.height, job.width)
