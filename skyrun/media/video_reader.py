"""Read the last frames of a video that a clip continues: upright, with square pixels, at the size of the clip."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from skyrun.errors import SkyrunError
from skyrun.media.container import Track, opened
from skyrun.media.pixels import Frames

_MARGIN = 3  # times the wanted frames are decoded at the end, before the whole video is
_USUAL_RATE, _FASTEST = Fraction(24), 240  # frames per second
_NTSC = 1001  # the denominator of rates such as 30000/1001
_OBLONG = 10  # limit of the aspect ratio of a pixel
_HDR = {16: "PQ", 18: "HLG"}  # transfer functions by their code in H.273

Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Footage:
    """The last frames of a video, uint8 [n, H, W, 3].

    rate: average frames per second. shape: height and width of the video as players show it. notices: sentences for the
    user.
    """

    path: Path
    frames: Frames
    rate: Fraction
    shape: Size
    notices: tuple[str, ...] = ()


def read_footage(path: Path, count: int, fit: Callable[[int, int], Size] = lambda *shape: shape) -> Footage:
    """Read the last `count` frames of a video. Raises SkyrunError if it has fewer, or is not a video.

    Args:
        path: The video.
        count: How many frames to read.
        fit: Returns the size of the frames for the size of the video. Each frame is scaled as soon as it is decoded.
    """
    with opened(path, "video") as container:
        stream = Track.video(path, container).stream
        start = _near_end(container, count, _plausible(stream.average_rate) or _USUAL_RATE)
    tail = _read_tail(path, count, fit, start)
    if len(tail.frames) < count and start:
        tail = _read_tail(path, count, fit, 0)
    if len(tail.frames) < count:
        what = f"{path} has {len(tail.frames)} frames, {count} are needed to go on from"
        hint = "give a longer video: the model has to see how things move"
        raise SkyrunError("; ".join((what, *tail.notices)), hint)
    notices = tuple(f"{path}: {notice}" for notice in tail.notices)
    return Footage(path, np.concatenate(tail.frames), tail.rate, tail.shape, notices)


def frames_at(path: Path, places: Iterable[int]) -> list[Frames]:
    """Read frames [H, W, 3] of a video by their indices, unscaled. Raises SkyrunError if it is not a video."""
    wanted = set(places)
    with opened(path, "video") as container:
        numbered = enumerate(Track.video(path, container).frames())
        return [frame.to_ndarray(format="rgb24") for number, frame in numbered if number in wanted]


def frame_count(path: Path) -> int:
    """The number of frames of a video according to its index."""
    with opened(path, "video") as container:
        return int(Track.video(path, container).stream.frames)


def nearest(frames: Frames, height: int, width: int) -> Frames:
    """Scale frames [n, H, W, 3] by nearest neighbor, with the float32 arithmetic of torch.

    Args:
        frames: The frames.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
    """
    rows, cols = (_places(have, want) for have, want in ((frames.shape[1], height), (frames.shape[2], width)))
    return np.ascontiguousarray(frames[:, rows][:, :, cols])


def _places(have: int, want: int) -> NDArray[np.int64]:
    scale = np.float32(have / want)
    return np.minimum((np.arange(want, dtype=np.float32) * scale).astype(np.int64), have - 1)


def quarter_turns(frame: Any) -> int:
    """How many counterclockwise quarter turns make a frame upright. Phones record sideways, and store the rotation."""
    return round((frame.rotation or 0) / 90) % 4


def _shown_shape(frame: Any, stream: Any) -> Size:
    """Height and width of a frame as players show it: upright, with square pixels."""
    aspect = stream.sample_aspect_ratio or 1
    width = round(frame.width * aspect) if 1 / _OBLONG < aspect < _OBLONG else frame.width
    height, width = frame.height, max(width, 1)
    return (width, height) if quarter_turns(frame) % 2 else (height, width)


def _near_end(container: Any, count: int, rate: Fraction) -> int:
    """The time in microseconds from which on there should be enough frames; 0 to decode the whole video."""
    if container.duration is None or container.duration <= 0:
        return 0
    return max(0, int(container.duration - _MARGIN * (count + rate) / rate * av.time_base))


@dataclass
class _Tail:
    """The last frames of a video. notices: clauses for the user."""

    frames: deque[Frames]
    rate: Fraction
    shape: Size
    notices: list[str]


def _read_tail(path: Path, count: int, fit: Callable[[int, int], Size], start: int) -> _Tail:
    """Decode from `start` in microseconds on, and keep the last frames."""
    kept: deque[Frames] = deque(maxlen=count)
    times: deque[float] = deque(maxlen=_MARGIN * count)
    shape: Size = (0, 0)
    with opened(path, "video") as container:
        track = Track.video(path, container)
        if start and not _seek(container, start):
            return _Tail(kept, _USUAL_RATE, shape, [])
        for frame in track.frames():
            if not kept:
                shape = _shown_shape(frame, track.stream)
                track.skipped *= not start  # seeking may end between key frames
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns(frame))[None]
            kept.append(nearest(pixels, *fit(*shape)))
            times += [] if frame.time is None else [frame.time]
        rate = _rate(track.stream, list(times))
        transfer = _HDR.get(track.stream.codec_context.color_trc)
    hdr = f"it is HDR ({transfer}) and read as if it were SDR, its colors are pale; convert it to have them right"
    return _Tail(kept, rate, shape, [notice for notice in (track.damage, transfer and hdr) if notice])


def _seek(container: Any, start: int) -> bool:
    """Seek to a time. Returns whether that was possible: raw streams cannot seek."""
    try:
        container.seek((container.start_time or 0) + start, any_frame=False, backward=True)
    except av.FFmpegError:
        return False
    return True


def _rate(stream: Any, times: list[float]) -> Fraction:
    """Frames per second: the file's average, or the rate of most frames if there is no average or it is far off.

    A single gap of an hour makes an average useless.
    """
    steps = [after - before for before, after in zip(times, times[1:], strict=False) if after > before]
    usual = 1 / float(np.median(steps)) if steps else 0.0
    average = _plausible(stream.average_rate)
    if average and (not usual or average / 2 <= usual <= average * 2):
        return average
    return _plausible(Fraction(usual).limit_denominator(_NTSC)) or average or _USUAL_RATE


def _plausible(rate: Fraction | None) -> Fraction | None:
    return Fraction(rate) if rate and 0 < rate <= _FASTEST else None
