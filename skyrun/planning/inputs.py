"""Read and check the inputs of a clip: images, video and speech."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from skyrun.errors import SkyrunError
from skyrun.media.image import open_image
from skyrun.media.speech import read_speech
from skyrun.media.video_reader import Footage, read_footage
from skyrun.planning.request import Request

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """The inputs of a clip. images: RGB, upright. footage: the last frames of the video. speech: samples at 16 kHz."""

    images: tuple[Image, ...] = ()
    footage: Footage | None = None
    speech: NDArray[np.float64] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the video or, without one, of the first image. The clip gets this aspect ratio."""
        if self.footage is not None:
            return self.footage.frames.shape[1], self.footage.frames.shape[2]
        return self.images[0].height, self.images[0].width


def open_inputs(request: Request, failures: list[SkyrunError]) -> Inputs:
    """Read the inputs that a request names. Errors are added to `failures`."""

    def attempt(read: Callable[..., T], *what: Any) -> T | None:
        try:
            return read(*what)
        except SkyrunError as error:
            failures.append(error)
            return None

    images = [attempt(open_image, path) for path in request.images]
    footage = attempt(read_footage, request.video, request.condition_frames) if request.video else None
    speech = attempt(read_speech, request.audio, request.seconds) if request.audio else None
    return Inputs(tuple(image for image in images if image is not None), footage, speech)
