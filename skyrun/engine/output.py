"""What a clip's file is like: its rate and sound, the video that it may begin with, and the names beside it."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from skyrun.errors import SkyrunError
from skyrun.media.image import suffix_problems
from skyrun.media.pixels import Frames
from skyrun.media.video_reader import read_frames, read_sound
from skyrun.media.video_writer import Format, Sound
from skyrun.planning.job import Job
from skyrun.planning.request import Request, place_problems
from skyrun.tasks.windows import RATE

# Beside X.mp4: the state of its run, frames and latents of finished windows, its lock; beside any file that is being
# written: the file before it is whole. A run writes and deletes all of these without asking.
_OWN_NAME = re.compile(r".*\.skyrun(\.\d+)?\.(safetensors|mkv|lock)|\..*\.\d+\.partial", re.IGNORECASE)


def check_outputs(request: Request, pictures: Sequence[Path] = ()) -> None:
    """SkyrunError if something would be lost: better before the run than when it is gone.

    pictures: where pictures of the clip will be drawn.
    """
    inputs = [path for path in (*request.images, request.video, request.audio) if path is not None]
    outputs = [path for path in (request.output, request.save_latents, *pictures) if path is not None]
    problems = [problem for place in pictures for problem in (*suffix_problems(place), *place_problems(place))]
    problems += [
        f"{path} is a name that runs use for what is not finished" for path in outputs if _OWN_NAME.fullmatch(path.name)
    ]
    problems += [
        f"{path} is named as what is not finished of a clip, it would be lost: rename it"
        for path in inputs
        if request.output is not None and _is_beside(path, request.output)
    ]
    taken = {path.resolve() for path in inputs}
    problems += [
        f"{path} is what the clip is made from, it would be lost" for path in outputs if path.resolve() in taken
    ]
    places = [path.resolve() for path in outputs]
    problems += [f"two outputs cannot both be {path}" for path in dict.fromkeys(places) if places.count(path) > 1]
    if problems:
        raise SkyrunError.listing("files would be lost or cannot be written", problems, "choose other names")


def _is_beside(path: Path, output: Path) -> bool:
    """Whether a run of this output writes or deletes a file of that name."""
    ours = path.name.lower().startswith((f"{output.stem}.skyrun.".lower(), f".{output.name}.".lower()))
    return ours and path.resolve().parent == output.resolve().parent and bool(_OWN_NAME.fullmatch(path.name))


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
        sound = Sound(levels.astype(np.float32)[None], RATE)
    return Format(job.height, job.width, fps, job.request.as_json(), sound)


def source_frames(job: Job) -> Iterator[Frames]:
    """Frames of the video that a clip begins with, in the clip's size; none if it is not joined."""
    if job.request.join:
        assert job.inputs.footage is not None
        yield from read_frames(job.inputs.footage, job.height, job.width)
