"""Talking avatar: a portrait speaks what is in a recording, window by window.

For a long clip, a first pass makes guide frames: each later window must end with one of them, so that the clip does not
drift away from the portrait. Every window after the first of the clip begins with the last frames of the one before,
the motion frames, which are noised to the sigma of the others at every step.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skyrun.events import Event, LatentsReady, WindowDone
from skyrun.media.color_match import match_colors
from skyrun.media.pixels import Frames, crop_portrait, to_pixels, truncated
from skyrun.models.audio_projection import windows as audio_windows
from skyrun.models.vae import LATENT_CHANNELS, groups_of
from skyrun.models.wav2vec2 import Wav2Vec2
from skyrun.pipelines.conditioning import Motion, condition_of
from skyrun.pipelines.finite import check_output
from skyrun.pipelines.samplers import new_sampler
from skyrun.pipelines.stages import Stage, decode, denoise, embed_image, encode_clip, encode_prompts, encode_text
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job
from skyrun.streaming.stream import ObserveBlock
from skyrun.tasks.skyreels_v3 import CONNECTION
from skyrun.tasks.windows import FRAMES_PER_LATENT, GUIDES, MOTION, Window, padded_frames, speech_frame_count
from skyrun.tasks.windows import latents as latents_of

_MOTION_LATENTS = latents_of(MOTION)

Events = Generator[Event, None, None]


@torch.inference_mode()
def talking_avatar(job: Job, state: RunState, observe: ObserveBlock | None = None) -> Iterator[Event]:
    """Run the stages, from "text" to "decode" of the last window."""
    yield from encode_prompts(job, state)
    if "connection" not in state.encoded and len(job.windows) > 1:
        state.encoded["connection"] = (yield from encode_text(job, CONNECTION)).cpu()
    if state.window >= len(job.windows):
        return
    speech = yield from _encode_speech(job)
    portrait = to_pixels(crop_portrait(job.inputs.images[0], job.height, job.width))
    noise = Noise(job)
    noise.skip(state.window)
    guides: dict[int, Tensor] = {}
    if state.window:
        yield from decode_again(job, state.carried["first"], _collect(job, guides, portrait))
    for index in range(state.window, len(job.windows)):
        yield from _Pass(job, state, index, portrait, speech, guides).run(noise, observe)


class Noise:
    """The noise of a clip, drawn from one CPU generator in the same order as upstream."""

    def __init__(self, job: Job) -> None:
        assert job.request.seed is not None
        self._generator = torch.Generator("cpu").manual_seed(job.request.seed)
        self._steps, self._size, self._windows = job.request.steps, (job.height // 8, job.width // 8), job.windows
        self._index = 0

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """The next window's noise [16, F, h, w], and [steps + 1, 16, M, h, w] for its motion frames if it has any."""
        window = self._windows[self._index]
        self._index += 1
        noise = self._normal(window.latents)
        if not window.skip:
            return noise, None
        return noise, torch.stack([self._normal(_MOTION_LATENTS) for _ in range(self._steps + 1)])

    def skip(self, windows: int) -> None:
        """Draw and discard the noise of windows that are finished."""
        for _ in range(windows):
            self.draw()

    def _normal(self, frames: int) -> Tensor:
        return torch.randn(LATENT_CHANNELS, frames, *self._size, generator=self._generator)


def _encode_speech(job: Job) -> Generator[Event, None, Tensor]:
    """Features of the speech [T, layers, channels], on the host. They are padded by their own reversed end."""
    speech = job.inputs.speech
    assert speech is not None and job.files.audio_encoder is not None
    encoder = Wav2Vec2(job.files.audio_encoder, job.device)
    stage = Stage("speech", encoder.layers, "layers", job.device)
    yield stage.started()
    layers = []
    for layer in encoder.encode(torch.from_numpy(speech), speech_frame_count(len(speech))):
        layers.append(layer.cpu())
        yield stage.done(len(layers))
    features = torch.stack(layers, 1)
    check_output(features, job.files.audio_encoder)
    after = max(0, padded_frames(job.windows, job.request.window_frames) - len(features)) if len(job.windows) > 1 else 0
    yield stage.ended()
    return torch.cat((features, features.flip(0)[:after]))


def decode_again(job: Job, latents: Tensor, collect: Callable[[Tensor, int], Tensor]) -> Events:
    """Decode the first pass again for its guide frames. Its frames are not part of the clip."""
    nothing = np.empty((0, job.height, job.width, 3), np.uint8)

    def show(pixels: Tensor, first: int) -> Frames:
        collect(pixels, first)
        return nothing

    yield from decode(job.files.vae, latents, RunState(), job.plan, job.device, show)


def _collect(job: Job, guides: dict[int, Tensor], portrait: Tensor) -> Callable[[Tensor, int], Tensor]:
    """A function that matches the colors of decoded pixels to the portrait and stores the guide frames among them."""
    wanted = {window.guide for window in job.windows}

    def collect(pixels: Tensor, first: int) -> Tensor:
        matched = match_colors(pixels, portrait[:, 0].to(pixels.device))
        for offset in range(matched.shape[1]):
            if first + offset in wanted:
                guides[first + offset] = matched[:, offset].cpu()
        return matched

    return collect


@dataclass
class _Pass:
    """Makes one window. guides: guide frames by their index in the first pass; that pass adds them."""

    job: Job
    state: RunState
    index: int
    portrait: Tensor
    speech: Tensor
    guides: dict[int, Tensor]

    def run(self, noise: Noise, observe: ObserveBlock | None) -> Events:
        """Encode the inputs of the window, denoise it, and decode it."""
        job, state, window = self.job, self.state, self.job.windows[self.index]
        start, motion_noise = noise.draw()
        beginning = state.carried["motion"] if window.skip else self.portrait
        tokens = yield from self._tokens(window, beginning)
        channels = yield from self._channels(window, beginning)
        motion = None
        if motion_noise is not None:
            motion = Motion(channels[-LATENT_CHANNELS:, :_MOTION_LATENTS], motion_noise)
        if state.sampler is None:
            state.sampler = new_sampler(job.request.spec, job.request.steps)
            state.latents = start if motion is None else motion.held(start, 0, state.sampler.sigmas[0])
        condition = condition_of(
            job,
            state,
            text="text" if window.guide is None else "connection",
            channels=channels,
            image=tokens,
            audio=audio_windows(self.speech, window.start, job.request.window_frames),
            motion=motion,
        )
        yield from denoise(job.files, job.plan, state, condition, job.device, observe, job.part(self.index))
        yield from self._decode(window)

    def _tokens(self, window: Window, beginning: Tensor) -> Generator[Event, None, Tensor]:
        """Tokens of the image that the window begins with. Those of the portrait are computed once."""
        vision, state = self.job.vision, self.state
        assert vision is not None
        if window.skip:
            return (yield from embed_image(vision, beginning[:, 0], self.job.device))
        if "picture" not in state.encoded:
            state.encoded["picture"] = (yield from embed_image(vision, beginning[:, 0], self.job.device)).cpu()
        return state.encoded["picture"]

    def _channels(self, window: Window, beginning: Tensor) -> Generator[Event, None, Tensor]:
        """The mask of given frames, four channels per latent frame, and the latents of a video of them, gray elsewhere.

        Given frames are those that the window begins with and the guide frame at its end.
        """
        job, count = self.job, self.job.request.window_frames
        gray = torch.zeros(3, 1, job.height, job.width)
        frames = [*beginning.split(1, 1), *[gray] * (count - beginning.shape[1])]  # one tensor, without copies
        mask = torch.zeros(count)
        mask[: beginning.shape[1]] = 1
        if window.guide is not None:
            frames[-GUIDES:] = [self.guides[window.guide].unsqueeze(1)] * GUIDES
            mask[-GUIDES:] = 1
        clip = (torch.cat(frames[group], 1) for group in groups_of(count))
        latents = yield from encode_clip(job.files.vae, clip, job.plan, job.device, job.part(self.index))
        given = torch.cat((mask[:1].expand(FRAMES_PER_LATENT - 1), mask)).view(-1, FRAMES_PER_LATENT).T
        return torch.cat((given[:, :, None, None].expand(-1, -1, *latents.shape[2:]), latents.cpu()))

    def _decode(self, window: Window) -> Events:
        job, state = self.job, self.state
        latents = state.latents
        assert latents is not None
        if not state.groups:
            yield LatentsReady(latents, self.index)
        end = job.request.window_frames - window.drop
        matching = _collect(job, self.guides if window.guide is None else {}, self.portrait)
        last: list[Tensor] = []

        def show(pixels: Tensor, first: int) -> Frames:
            matched = matching(pixels[:, : max(0, end - first)], first)
            last[:] = [torch.cat((*last, matched.cpu()), 1)[:, -MOTION:]]
            skip = window.skip if window.frames else job.request.window_frames
            return truncated(matched[:, max(0, skip - first) :])

        yield from decode(job.files.vae, latents, state, job.plan, job.device, show, job.part(self.index))
        if len(job.windows) > 1:
            first = latents if window.guide is None else state.carried["first"]
            state.finish_window(motion=last[0], first=first)
            yield WindowDone(self.index, len(job.windows))
