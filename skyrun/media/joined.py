"""Read the video that a clip is joined to: all frames and audio, on a clock that does not jump."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from skyrun.media.audio import Audio, Resampler, Samples, mono, stereo
from skyrun.media.container import Track, opened
from skyrun.media.pixels import Frames
from skyrun.media.video_reader import Footage, quarter_turns
from skyrun.media.video_writer import AAC_RATES

_JUMP = 10.0  # seconds without frames or audio after which the clock is taken to have jumped
_OFF = 0.1  # seconds by which audio may be late before silence is inserted
_NEAR = 1.0  # seconds around a jump in which the other stream may end and begin
_USUAL_RATE = 48000


def read_frames(footage: Footage, height: int, width: int, notices: list[str] | None = None) -> Iterator[Frames]:
    """Yield every frame at a constant rate, uint8 [1, H, W, 3]. If the rate varies, frames are repeated or left out.

    Args:
        footage: The end of the video, and its rate.
        height: Of the yielded frames.
        width: Of the yielded frames.
        notices: A sentence about damage is appended to them at the end.
    """
    with opened(footage.path, "video") as container:
        track, step = Track.video(footage.path, container), float(1 / footage.rate)
        clock, place, count = _Clock(footage.path, "audio", step * 0.999), -step, 0
        shown: Frames | None = None
        for frame in track.frames():
            place = clock.place(frame.time, place + step)
            while shown is not None and count < math.floor(place / step + 0.5):
                count += 1
                yield shown
            turns = quarter_turns(frame)
            size = (height, width) if turns % 2 else (width, height)
            scaled = frame.reformat(*size, format="rgb24", interpolation="AREA").to_ndarray()
            shown = np.ascontiguousarray(np.rot90(scaled, turns), np.uint8)[None]
        if shown is not None:
            yield shown
        if notices is not None and track.damage:
            notices.append(f"{footage.path}: {track.damage}")


def read_audio(path: Path) -> Audio | None:
    """The audio of a video from its first frame on, with at most two channels; None if it has no audio."""
    with opened(path, "video") as container:
        first = next(Track.audio(path, container).frames(), None) if container.streams.audio else None
        if first is None:
            return None
        channels = min(first.layout.nb_channels, 2)
        rate = first.sample_rate if first.sample_rate in AAC_RATES else _USUAL_RATE
    return Audio(_from_first_frame(path, channels, rate), channels, rate)


def _from_first_frame(path: Path, channels: int, rate: int) -> Iterator[Samples]:
    """Audio from the time of the first frame on: earlier samples are cut off, and silence fills what is missing."""
    with opened(path, "video") as container:
        begin = next((frame.time for frame in Track.video(path, container).frames()), None)
    with opened(path, "video") as container:
        track = Track.audio(path, container)
        begins = next((frame.time for frame in track.frames()), None)
    late = round((begins - begin) * rate) if begin is not None and begins is not None else 0
    yield from _silence(channels, max(late, 0), rate)
    early = max(-late, 0)
    for piece in _pieces(path, channels, rate):
        yield piece[:, early:]
        early = max(0, early - piece.shape[1])


def _pieces(path: Path, channels: int, rate: int) -> Iterator[Samples]:
    """All samples, with silence in gaps."""
    resampler, mix = Resampler(rate, channels), mono if channels == 1 else stereo
    clock, heard = _Clock(path, "video", _OFF), 0.0
    with opened(path, "video") as container:
        for frame in Track.audio(path, container).frames():
            place, samples = clock.place(frame.time, heard), mix(frame)
            if place > heard + _OFF:
                for gap in _silence(channels, round((place - heard) * frame.sample_rate), frame.sample_rate):
                    yield from resampler.pieces(gap, frame.sample_rate)
                heard = place
            yield from resampler.pieces(samples, frame.sample_rate)
            heard += frame.samples / frame.sample_rate
        yield from resampler.rest()


def _silence(channels: int, count: int, most: int) -> Iterator[Samples]:
    """`count` samples of silence, in pieces of at most `most`."""
    for start in range(0, count, most):
        yield np.zeros((channels, min(most, count - start)), np.float32)


class _Clock:
    """Assigns times to the frames of a stream, in seconds from the first, without the jumps of its timestamps."""

    def __init__(self, path: Path, other: str, slack: float) -> None:
        """other: the stream that tells a gap from a jump. slack: seconds by which frames may overlap."""
        self._path, self._other, self._slack = path, other, slack
        self._shift: float | None = None
        self._time = 0.0  # timestamp of the last frame in the file

    def place(self, time: float | None, end: float) -> float:
        """When a frame with this timestamp begins, if the frame before it ends at `end`."""
        if time is None:
            return end
        if self._shift is None:
            self._shift = end - time
        place = time + self._shift
        backwards = place < end - self._slack
        if backwards or (place > end + _JUMP and not self._is_gap(self._time, time)):
            self._shift += end - place
            place = end
        self._time = time
        return place

    def _is_gap(self, before: float, after: float) -> bool:
        """Whether the other stream has packets in between."""
        following = bisect_right(self._times, before + _NEAR)
        return following < len(self._times) and self._times[following] < after - _NEAR

    @cached_property
    def _times(self) -> list[float]:
        """Sorted timestamps of the other stream's packets."""
        with opened(self._path, "video") as container:
            if not getattr(container.streams, self._other):
                return []
            track = Track.audio(self._path, container) if self._other == "audio" else Track.video(self._path, container)
            packets = [packet for packet in track.packets() if packet is not None and packet.pts is not None]
            return sorted(float(packet.pts * packet.time_base) for packet in packets)
