"""What a clip is made from: pictures, video and speech, read and checked before anything heavy begins."""

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
    """pictures: RGB, upright. footage: the last frames of the video. speech: samples [n] at 16 kHz."""

    pictures: tuple[Image, ...] = ()
    footage: Footage | None = None
    speech: NDArray[np.float64] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what the clip is shaped like: the first picture, or the video."""
        if self.footage is not None:
            return self.footage.frames.shape[1], self.footage.frames.shape[2]
        return self.pictures[0].height, self.pictures[0].width


def open_inputs(request: Request, failures: list[SkyrunError]) -> Inputs:
    """Read what a request names. What is wrong with it is added to the failures."""

    def attempt(read: Callable[..., T], *what: Any) -> T | None:
        try:
            return read(*what)
        except SkyrunError as error:
            failures.append(error)
            return None

    pictures = [attempt(open_image, path) for path in request.images]
    footage = attempt(read_footage, request.video, request.condition_frames) if request.video else None
    speech = attempt(read_speech, request.audio, request.seconds) if request.audio else None
    return Inputs(tuple(picture for picture in pictures if picture is not None), footage, speech)
