"""Video that a clip goes on from: its last frames, upright, as they are in the file."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from skyrun.errors import SkyrunError
from skyrun.media.pixels import Frames
from skyrun.media.video_writer import Sound

_MARGIN = 3  # times the frames wanted are looked at from the end, before the whole video is
_USUAL_RATE = 24
_REPAIR = "leave out --join, or repair the video"


@dataclass(frozen=True)
class Footage:
    """The last frames of a video, uint8 [n, H, W, 3]. rate: frames per second, on average."""

    path: Path
    frames: Frames
    rate: Fraction


def read_footage(path: Path, count: int) -> Footage:
    """The last `count` frames of a video. SkyrunError if it has fewer, or is no video."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise SkyrunError(f"{path} has no pictures in it", "give a video to --video")
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate or _USUAL_RATE)
            frames, seen = _last(container, count, _near_end(container, stream, count, rate))
            if seen < count:
                frames, seen = _last(container, count, 0)
    except (av.FFmpegError, OSError) as error:
        raise SkyrunError(f"{path} is no readable video: {error}", "use MP4, MOV, MKV or WebM") from error
    if seen < count:
        raise SkyrunError(
            f"{path} has {seen} frames, {count} are needed to go on from",
            "give a longer video: the model has to see how things move",
        )
    return Footage(path, np.stack(frames), rate)


def read_frames(footage: Footage, height: int, width: int) -> Iterator[Frames]:
    """Every frame of the video at its constant rate, uint8 [1, H, W, 3]: some twice or not at all where it varies."""
    try:
        with av.open(str(footage.path)) as container:
            first, count = None, 0
            shown: Frames | None = None
            for frame in container.decode(video=0):
                time = frame.time or 0.0
                first = time if first is None else first
                place = round((time - first) * float(footage.rate))
                while shown is not None and count < place:
                    count += 1
                    yield shown
                turns = _turns(frame)
                size = (height, width) if turns % 2 else (width, height)
                scaled = frame.reformat(*size, format="rgb24", interpolation="AREA").to_ndarray()
                shown = np.ascontiguousarray(np.rot90(scaled, turns), np.uint8)[None]
            if shown is not None:
                yield shown
    except (av.FFmpegError, OSError) as error:
        raise SkyrunError(f"{footage.path} cannot be read to its end: {error}", _REPAIR) from error


def read_sound(path: Path) -> Sound | None:
    """The sound of a video from its first picture on, at most two channels; None if it has none."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                return None
            start, pieces, resampler = 0.0, [], None
            for frame in container.decode(audio=0):
                if resampler is None:
                    start = frame.time or 0.0
                    layout = "mono" if frame.layout.nb_channels == 1 else "stereo"
                    resampler = av.AudioResampler(format="fltp", layout=layout, rate=frame.sample_rate)
                pieces += [piece.to_ndarray() for piece in resampler.resample(frame)]
            video = container.streams.video[0]
            begin = float((video.start_time or 0) * (video.time_base or 0))
            rate = container.streams.audio[0].rate
    except (av.FFmpegError, OSError) as error:
        raise SkyrunError(f"the sound of {path} cannot be read: {error}", _REPAIR) from error
    if not pieces:
        return None
    samples, late = np.concatenate(pieces, 1, dtype=np.float32), round((start - begin) * rate)
    samples = np.pad(samples, ((0, 0), (late, 0))) if late > 0 else samples[:, -late:]
    return Sound(samples, rate)


def nearest(frames: Frames, height: int, width: int) -> Frames:
    """Frames [n, H, W, 3] in another size, every pixel that of the nearest place. torch's arithmetic, in float32."""
    rows, cols = (_places(have, want) for have, want in ((frames.shape[1], height), (frames.shape[2], width)))
    return np.ascontiguousarray(frames[:, rows][:, :, cols])


def _places(have: int, want: int) -> NDArray[np.int64]:
    scale = np.float32(have / want)
    return np.minimum((np.arange(want, dtype=np.float32) * scale).astype(np.int64), have - 1)


def _near_end(container: Any, stream: Any, count: int, rate: Fraction) -> int:
    """Microseconds from which on there should be enough frames; 0: look at all."""
    if container.duration is None or container.duration <= 0:
        return 0
    return max(0, int(container.duration - _MARGIN * (count + rate) / rate * av.time_base))


def _last(container: Any, count: int, start: int) -> tuple[list[Frames], int]:
    """The last frames, and how many there were from `start` on."""
    container.seek((container.start_time or 0) + start if start else 0, any_frame=False, backward=True)
    kept: deque[Any] = deque(maxlen=count)
    seen = 0
    for frame in container.decode(video=0):
        kept.append(frame)
        seen += 1
    return [np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame)) for frame in kept], seen


def _turns(frame: Any) -> int:
    """Quarter turns counterclockwise that make a frame upright; phones record sideways and say so."""
    return round((frame.rotation or 0) / 90) % 4
