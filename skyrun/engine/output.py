"""What a clip's file is like: its rate and sound, and the video that it may begin with."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from skyrun.media.pixels import Frames
from skyrun.media.video_reader import read_frames, read_sound
from skyrun.media.video_writer import Format, Sound
from skyrun.planning.job import Job
from skyrun.tasks.windows import SPEECH_RATE


def clip_format(job: Job) -> Format:
    """A talking avatar carries its speech, at the level that the model heard it. A clip that is joined to its video has
    that one's rate, which its motion goes on at, and its sound."""
    fps, sound = Fraction(job.fps), None
    if job.request.join:
        assert job.inputs.footage is not None
        fps, sound = job.inputs.footage.rate, read_sound(job.inputs.footage.path)
    if job.inputs.speech is not None:
        # Through 16 bits, as upstream's file has it: what is louder is cut off.
        levels = np.clip(np.round(job.inputs.speech * 32767), -32768, 32767) / 32768
        sound = Sound(levels.astype(np.float32)[None], SPEECH_RATE)
    return Format(job.height, job.width, fps, job.request.as_json(), sound)


def source_frames(job: Job) -> Iterator[Frames]:
    """Frames of the video that a clip begins with, in the clip's size; none if it is not joined."""
    if job.request.join:
        assert job.inputs.footage is not None
        yield from read_frames(job.inputs.footage, job.height, job.width)
