"""Write a clip as mp4, with audio if it has any, and read the request back from a clip."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from mmap import mmap
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace

from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.files.atomic import replacing
from skyrun.media.audio import Audio, Samples
from skyrun.media.container import opened
from skyrun.media.pixels import Frames

# The `comment` tag survives remuxing and re-encoding; custom keys do not.
_TAG = "comment"
# What is known only in the end is written over a text as long as that, beside the request.
_MEASURED, _ROOM = "measured", "~" * 120
_ADAPTERS = "adapters"  # their fingerprints, beside the request
# Visually lossless. Without macroblock trees, by which x264 makes other bytes of the same frames now and then.
_ENCODING = {"crf": "16", "mbtree": "0"}
_BT709 = 1
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_OPTIONS = {"movflags": "+faststart"}  # the index comes first, so that players start before the whole file has arrived
_LONGEST, _DEEPEST = 1 << 20, 4  # characters of a comment that are parsed, and levels of nesting
_LARGEST = 1 << 64  # integer; seeds are below it


@dataclass(frozen=True)
class Format:
    """Settings of an mp4.

    height, width: of the frames that are added. fps: frames per second. comment: the request it is made from, as plain
    values. scale: how many pixels high and wide the mp4 shows a pixel. measures: whether what is measured meanwhile
    will be put beside the request. adapters: fingerprints of the request's adapters, in order.
    """

    height: int
    width: int
    fps: Fraction
    comment: dict[str, Any]
    audio: Audio | None = None
    scale: int = 1
    measures: bool = False
    adapters: tuple[str, ...] = ()


class VideoWriter:
    """Encodes frames as they are decoded: H.264, yuv420p, BT.709. AAC audio keeps pace with the frames.

    measured: plain values that are put beside the request in the end, where the format says so.
    """

    def __init__(self, container: Any, format: Format) -> None:
        self._container, self._format = container, format
        self._stream = container.add_stream("libx264", rate=format.fps, options=_ENCODING)
        self._stream.height, self._stream.width = format.scale * format.height, format.scale * format.width
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        self.count = 0  # frames so far
        self.measured: dict[str, Any] = {}
        self._audio = _AudioWriter(container, format.audio) if format.audio is not None else None

    def add(self, frames: Frames) -> None:
        """Encode uint8 [n, H, W, 3]."""
        for pixels in frames:
            if (scale := self._format.scale) > 1:
                pixels = pixels.repeat(scale, 0).repeat(scale, 1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            self._container.mux(self._stream.encode(frame))
            self.count += 1
        if self._audio is not None:
            self._audio.add_until(self.count / self._format.fps)

    def finish(self) -> None:
        """Flush the encoders."""
        self._container.mux(self._stream.encode())
        if self._audio is not None:
            self._audio.finish()


class _AudioWriter:
    """Encodes audio up to the time of the last frame."""

    def __init__(self, container: Any, audio: Audio) -> None:
        self._container, self._rate = container, audio.rate
        self._layout = "mono" if audio.channels == 1 else "stereo"
        self._stream = container.add_stream("aac", rate=audio.rate, layout=self._layout)
        self._pieces = iter(audio.pieces)
        self._next: Samples = np.zeros((audio.channels, 0), np.float32)
        self._count = 0  # samples so far

    def add_until(self, seconds: Fraction) -> None:
        """Encode samples up to that time, or all that are left."""
        end = int(seconds * self._rate)
        while self._count < end:
            if not self._next.shape[1]:
                piece = next(self._pieces, None)
                if piece is None:
                    return
                self._next = piece
                continue
            piece, self._next = np.split(self._next, [end - self._count], axis=1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="fltp", layout=self._layout)
            frame.sample_rate, frame.pts, frame.time_base = self._rate, self._count, Fraction(1, self._rate)
            self._container.mux(self._stream.encode(frame))
            self._count += piece.shape[1]

    def finish(self) -> None:
        self._container.mux(self._stream.encode())


@contextmanager
def writing_video(path: Path, format: Format) -> Iterator[VideoWriter]:
    """A writer of an mp4 that appears at `path` when it is complete. Its temporary file is created at once."""
    try:
        with replacing(path.absolute()) as partial:
            # FFmpeg takes what precedes a colon in a relative path for a protocol.
            with av.open(str(partial), "w", format="mp4", options=_OPTIONS) as container:
                beside: dict[str, Any] = {_MEASURED: _ROOM} if format.measures else {}
                beside |= {_ADAPTERS: format.adapters} if format.adapters else {}
                container.metadata[_TAG] = json.dumps(format.comment | beside)
                writer = VideoWriter(container, format)
                yield writer
                writer.finish()
            if format.measures:
                _fill_in(partial, writer.measured)
    except (av.FFmpegError, OSError) as error:
        raise SkyrunError(f"cannot write {path}: {error}", "check free space and permissions", FAILED) from error


def _fill_in(path: Path, measured: dict[str, Any]) -> None:
    """Put what was measured into the comment, which was written before the first frame, with room for it."""
    there, text = json.dumps(_ROOM).encode(), json.dumps(measured).encode()
    assert len(text) <= len(there)
    with path.open("r+b") as file, mmap(file.fileno(), 0) as whole:
        place = whole.find(there)
        if place >= 0:
            whole[place : place + len(there)] = text.ljust(len(there))


def read_request(path: Path) -> dict[str, Any] | None:
    """Read the request in a clip's comment; None if there is none. Raises SkyrunError if the file is not a video.

    The values are bounded and plain: text without NUL, numbers below 2^64, lists and dicts of these.
    """
    with opened(path, "video") as container:
        comment = container.metadata.get(_TAG, "")
    if not comment.lstrip().startswith("{") or len(comment) > _LONGEST:
        return None
    try:
        request = json.loads(comment, parse_constant=_refuse)
    except RecursionError:
        raise _unusable(path, "lists within lists without end") from None
    except ValueError:
        return None
    if (problem := _problem(request)) is not None:
        raise _unusable(path, problem)
    return {name: value for name, value in request.items() if name not in (_MEASURED, _ADAPTERS)}


def read_measured(path: Path) -> dict[str, Any]:
    """Read what was measured while a clip was made, from its comment; empty if nothing was."""
    measured = _beside_the_request(path, _MEASURED)
    return measured if isinstance(measured, dict) else {}


def read_adapters(path: Path) -> list[Any]:
    """Read the fingerprints of the adapters that a clip was made with, from its comment; empty if it has none."""
    adapters = _beside_the_request(path, _ADAPTERS)
    return adapters if isinstance(adapters, list) else []


def _beside_the_request(path: Path, name: str) -> Any:
    with opened(path, "video") as container:
        comment = container.metadata.get(_TAG, "")
    try:
        return json.loads(comment[:_LONGEST])[name]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _unusable(path: Path, problem: str) -> SkyrunError:
    return SkyrunError(f"{path} says how it was made with {problem}", "--from takes a clip that skyrun has made")


def _problem(value: Any, depth: int = 0) -> str | None:
    """Why these values cannot be a request; None if they can."""
    if depth > _DEEPEST:
        return "lists within lists without end"
    if isinstance(value, str) and "\0" in value:
        return "text that has a NUL in it"
    if isinstance(value, (int, float)) and not abs(value) < _LARGEST:
        return "a number of absurd size"
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((problem for item in inner if (problem := _problem(item, depth + 1)) is not None), None)
