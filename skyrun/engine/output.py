"""What a clip's file is like: its rate and audio, and the video that it may begin with."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from skyrun.media.audio import Audio
from skyrun.media.joined import read_audio, read_frames
from skyrun.media.pixels import Frames
from skyrun.media.video_writer import Format
from skyrun.planning.job import Job
from skyrun.tasks.windows import SPEECH_RATE


def clip_format(job: Job) -> Format:
    """A talking avatar carries its speech, at the level that the model heard it. A clip that is joined to its video has
    that one's rate, which its motion goes on at, and its audio."""
    fps, audio = Fraction(job.fps), None
    if job.request.join:
        assert job.inputs.footage is not None
        fps, audio = job.inputs.footage.rate, read_audio(job.inputs.footage.path)
    if job.inputs.speech is not None:
        # Through 16 bits, as upstream's file has it: what is louder is cut off.
        levels = np.clip(np.round(job.inputs.speech * 32767), -32768, 32767) / 32768
        audio = Audio([levels.astype(np.float32)[None]], 1, SPEECH_RATE)
    return Format(job.height, job.width, fps, job.request.as_json(), audio)


def source_frames(job: Job, notices: list[str]) -> Iterator[Frames]:
    """Frames of the video that a clip begins with, in the clip's size; none if it is not joined.

    What a person should know of it is added to the notices.
    """
    if job.request.join:
        assert job.inputs.footage is not None
        yield from read_frames(job.inputs.footage, job.height, job.width, notices)
