"""Write a clip and its latents from the events of a pipeline, and collect the result."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from skyrun.engine.output import fingerprints
from skyrun.errors import FAILED, SkyrunError
from skyrun.events import Event, FramesReady, LatentsReady, StageEnded
from skyrun.kernels.files.atomic import replacing
from skyrun.media.audio import Audio
from skyrun.media.joined import read_audio, read_frames
from skyrun.media.pixels import Frames
from skyrun.media.video_writer import Format, VideoWriter, writing_video
from skyrun.models.dit.sparse import Learned, Skipped
from skyrun.planning.job import Job
from skyrun.planning.request import Request
from skyrun.presets import Plan
from skyrun.tasks.windows import SPEECH_RATE


@dataclass(frozen=True)
class Result:
    """A finished clip.

    frames: uint8 [F, H, W, 3]; empty if they were not kept. latents: float32 [C, F', h, w], normalized, as they were
    before decoding, all windows in order. request: with the seed that was used. stages: time and memory of each.
    skipped: what attention skipped, and what that cost; None if it skips nothing.
    """

    frames: Frames
    latents: Tensor
    fps: int
    request: Request
    plan: Plan
    stages: tuple[StageEnded, ...]
    skipped: Skipped | None = None

    @property
    def output(self) -> Path | None:
        """The path of the mp4, if one was written."""
        return self.request.output


class ClipWriter:
    """Writes the frames and latents in the events of a pipeline."""

    def __init__(self, job: Job, keep_frames: bool) -> None:
        self._job, self._keep_frames = job, keep_frames
        self._adapters = fingerprints(job.request)
        self._frames: list[Frames] = []
        self._stages: list[StageEnded] = []
        self._failure: SkyrunError | None = None
        self.latents: dict[int, Tensor] = {}  # by window
        self.video: VideoWriter | None = None

    def open(self, stack: ExitStack) -> list[str]:
        """Begin the mp4, with the source video if the clip is joined to it. Returns notices about that video."""
        notices: list[str] = []
        if self._job.request.output is None:
            return notices
        self.video = stack.enter_context(writing_video(self._job.request.output, clip_format(self._job)))
        for frames in source_frames(self._job, notices):
            self.video.add(frames)
        return [text for text in notices if text not in self._job.inputs.notices]

    def take(self, event: Event) -> None:
        """Handle an event of the pipeline."""
        if isinstance(event, LatentsReady):
            self.latents[event.window] = event.latents
            if len(self._job.windows) == 1:
                self._failure = self._save_latents()
        elif isinstance(event, FramesReady):
            self.add(event.frames)
        elif isinstance(event, StageEnded):
            self._stages.append(event)

    def add(self, frames: Frames) -> None:
        """Write frames of the clip, and keep them for the result."""
        if self.video is not None:
            self.video.add(frames)
        if self._keep_frames:
            self._frames.append(frames)

    def note(self, learned: Learned) -> None:
        """Put into the mp4's settings what attention has skipped."""
        if self.video is not None and (skipped := learned.summary()) is not None:
            self.video.measured = {name: round(value, 6) for name, value in asdict(skipped).items()}

    def save_latents(self) -> None:
        """Write the latents if they are not written yet. Raises SkyrunError if that failed; the clip is complete."""
        if len(self._job.windows) > 1:
            self._failure = self._save_latents()
        if self._failure is not None:
            raise self._failure

    def _save_latents(self) -> SkyrunError | None:
        """Write the latents if the request names a file. Returns the error if that fails."""
        request = self._job.request
        if request.save_latents is None:
            return None
        try:
            with replacing(request.save_latents) as partial:
                metadata = {"request": json.dumps(request.as_json()), "adapters": json.dumps(self._adapters)}
                save_file({"latents": torch.cat(list(self.latents.values()), 1).contiguous()}, partial, metadata)
        except (OSError, SafetensorError) as error:
            message = f"cannot write {request.save_latents}: {error}"
            return SkyrunError(message, "check free space and permissions", FAILED)
        return None

    def result(self, plan: Plan, learned: Learned) -> Result:
        """The finished clip. learned: of its attention."""
        job, empty = self._job, np.empty((0, self._job.height, self._job.width, 3), np.uint8)
        frames = np.concatenate([empty, *self._frames])
        latents = torch.cat(list(self.latents.values()), 1).clone()  # an ordinary tensor, not one of inference mode
        return Result(frames, latents, job.fps, job.request, plan, tuple(self._stages), learned.summary())


def clip_format(job: Job) -> Format:
    """The settings of a clip's mp4.

    A joined clip has the frame rate of its source video, whose motion it continues, and the audio of that video. A
    talking avatar has its speech, as loud as the model heard it.
    """
    fps, audio = Fraction(job.fps), None
    if job.request.join:
        assert job.inputs.footage is not None
        fps, audio = job.inputs.footage.rate, read_audio(job.inputs.footage.path)
    if job.inputs.speech is not None:
        # Rounded to 16 bits and clipped, as in the file that upstream writes.
        levels = np.clip(np.round(job.inputs.speech * 32767), -32768, 32767) / 32768
        audio = Audio([levels.astype(np.float32)[None]], 1, SPEECH_RATE)
    request, sparse = job.request, bool(job.plan.sparse)
    return Format(job.height, job.width, fps, request.as_json(), audio, job.scale, sparse, fingerprints(request))


def source_frames(job: Job, notices: list[str]) -> Iterator[Frames]:
    """Frames of the video that a clip is joined to, in the size of the clip; none if it is not joined.

    Sentences for the user are appended to the notices.
    """
    if job.request.join:
        assert job.inputs.footage is not None
        yield from read_frames(job.inputs.footage, job.height, job.width, notices)
