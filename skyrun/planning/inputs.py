"""What a clip is made from: images, video and speech, read and checked before anything heavy begins."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from skyrun.errors import SkyrunError
from skyrun.media.image import open_image
from skyrun.media.speech import read_speech
from skyrun.media.video_reader import Footage, read_footage
from skyrun.planning.request import Request
from skyrun.tasks.sizes import WIDE
from skyrun.tasks.windows import SPEECH_RATE

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """images: RGB, upright. footage: the last frames of the video, in the size of the clip. speech: samples [n] at
    16 kHz. notices: what a person should know of them."""

    images: tuple[Image, ...] = ()
    footage: Footage | None = None
    speech: NDArray[np.float64] | None = None
    notices: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what the clip is shaped like: the first image, or the video as it is shown."""
        if self.footage is not None:
            return self.footage.shape
        if not self.images:
            return WIDE
        return self.images[0].height, self.images[0].width


def clip_size(request: Request, height: int, width: int) -> tuple[int, int]:
    """Height and width of the clip: those asked for, or what suits an input of that shape."""
    assert not isinstance(request.size, str)
    return request.size or request.spec.size(request.resolution, height, width)


def open_inputs(request: Request, failures: list[SkyrunError]) -> Inputs:
    """Read the inputs that a request names. Errors are added to `failures`."""

    def attempt(read: Callable[..., T], *what: Any) -> T | None:
        try:
            return read(*what)
        except SkyrunError as error:
            failures.append(error)
            return None

    images = [attempt(open_image, path) for path in request.images]
    footage, speech = None, None
    if request.video:
        fit = partial(clip_size, request)
        footage = attempt(read_footage, request.video, request.condition_frames, fit)
    if request.audio:
        speech = attempt(read_speech, request.audio, SPEECH_RATE, request.spec.seconds, request.seconds)
    notices = tuple(notice for source in (footage, speech) if source is not None for notice in source.notices)
    opened = tuple(image for image in images if image is not None)
    return Inputs(opened, footage, speech.samples if speech is not None else None, notices)
