"""Write a clip as mp4, with sound where it has some, and read back what it was made from."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace
from numpy.typing import NDArray

from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.atomic import replacing
from skyrun.media.pixels import Frames

# The `comment` tag survives remuxing and re-encoding; custom keys do not.
_TAG = "comment"
_CRF = "16"
_BT709 = 1
_SAMPLES = 1024  # of an AAC packet
_OPTIONS = {"movflags": "+faststart"}  # the index first, so that players start before the end


@dataclass(frozen=True)
class Sound:
    """samples: float32 [channels, n] in [-1, 1], channels one or two. rate: of them per second."""

    samples: NDArray[np.float32]
    rate: int


@dataclass(frozen=True)
class Format:
    """What an mp4 is like. fps: frames per second. comment: what it was made from, plain values."""

    height: int
    width: int
    fps: Fraction
    comment: dict[str, Any]
    sound: Sound | None = None


class VideoWriter:
    """Takes frames as they are decoded; H.264, yuv420p, BT.709, and AAC beside it as far as the frames are."""

    def __init__(self, container: Any, format: Format) -> None:
        self._container, self._format = container, format
        self._stream = container.add_stream("libx264", rate=format.fps, options={"crf": _CRF})
        self._stream.height, self._stream.width, self._stream.pix_fmt = format.height, format.width, "yuv420p"
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        self.count = 0  # frames so far
        self._heard, self._sound = 0, format.sound
        if self._sound is not None:
            layout = "mono" if len(self._sound.samples) == 1 else "stereo"
            self._speech = container.add_stream("aac", rate=self._sound.rate, layout=layout)

    def add(self, frames: Frames) -> None:
        """Encode uint8 [n, H, W, 3]."""
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            self._container.mux(self._stream.encode(frame))
            self.count += 1
        self._add_sound(int(self.count / self._format.fps * self._sound.rate) if self._sound else 0)

    def finish(self) -> None:
        """Write what the encoders still hold."""
        self._container.mux(self._stream.encode())
        if self._sound is not None:
            self._add_sound(min(self._sound.samples.shape[1], int(self.count / self._format.fps * self._sound.rate)))
            self._container.mux(self._speech.encode())

    def _add_sound(self, end: int) -> None:
        """Encode samples up to `end`, in whole packets but for the last."""
        if self._sound is None:
            return
        samples, rate = self._sound.samples, self._sound.rate
        end = min(end, samples.shape[1])
        while self._heard < end:
            piece = samples[:, self._heard : min(end, self._heard + _SAMPLES)]
            layout = "mono" if len(samples) == 1 else "stereo"
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, self._heard, Fraction(1, rate)
            self._container.mux(self._speech.encode(frame))
            self._heard += piece.shape[1]


@contextmanager
def writing_video(path: Path, format: Format) -> Iterator[VideoWriter]:
    """A writer for an mp4 that appears under `path` when it is whole."""
    try:
        with replacing(path) as partial, av.open(str(partial), "w", format="mp4", options=_OPTIONS) as container:
            container.metadata[_TAG] = json.dumps(format.comment)
            writer = VideoWriter(container, format)
            yield writer
            writer.finish()
    except (av.FFmpegError, OSError) as error:
        raise SkyrunError(f"cannot write {path}: {error}", "check free space and permissions", FAILED) from error


def read_request(path: Path) -> dict[str, Any] | None:
    """The request in a clip's comment; None if the clip carries none. SkyrunError if it is no video."""
    try:
        with av.open(str(path)) as container:
            comment = container.metadata.get(_TAG, "")
    except (av.FFmpegError, OSError) as error:
        raise SkyrunError(f"{path} is not a readable video: {error}", "check the path") from error
    try:
        request = json.loads(comment)
    except ValueError:
        return None
    return request if isinstance(request, dict) else None
