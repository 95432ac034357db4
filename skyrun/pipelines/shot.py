"""Shot switching: make the shot after a cut from the last frames before it and a prompt that tags the kind of cut."""

from collections.abc import Iterator

import torch

from skyrun.events import Event, LatentsReady
from skyrun.media.pixels import from_uint8, truncated
from skyrun.media.video_reader import nearest
from skyrun.models.vae import groups_of
from skyrun.pipelines.conditioning import Condition
from skyrun.pipelines.extension import begin
from skyrun.pipelines.stages import decode, denoise, encode_clip, encode_text
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.streaming.stream import ObserveBlock

_POSITION = 1024  # of the frames before the cut on the time axis, where the new frames begin at 0


@torch.inference_mode()
def shot_switching(job: Job, state: RunState, observe: ObserveBlock | None = None) -> Iterator[Event]:
    """Run the stages. Frames before the cut follow the new ones in the sequence, without noise, far away in time."""
    request, plan, files, device = job.request, job.plan, job.files, job.device
    assert job.inputs.footage is not None
    if "text" not in state.encoded:
        state.encoded["text"] = (yield from encode_text(job, request.prompt)).cpu()
    if "video" not in state.encoded:
        frames = nearest(job.inputs.footage.frames, job.height, job.width)
        groups = (from_uint8(frames[group]) for group in groups_of(len(frames)))
        state.encoded["video"] = (yield from encode_clip(files.vae, groups, plan, device)).cpu()
    begin(job, state, 0)
    condition = Condition(state.encoded["text"], after=state.encoded["video"], clean=True, after_position=_POSITION)
    yield from denoise(files.transformer, plan, state, condition, device, observe)
    assert state.latents is not None
    if not state.groups:
        yield LatentsReady(state.latents)
    yield from decode(files.vae, state.latents, state, plan, device, lambda pixels, _: truncated(pixels))
