"""Audio as samples: any number of channels mixed to one or two, any rates brought to one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from skyrun.errors import SkyrunError

Samples = NDArray[np.float32]  # [channels, n]
_SLOWEST, _FASTEST = 1000, 1_000_000  # samples per second that are believed
_NAMED = 8  # channels, whose places FFmpeg knows how to mix
# The zero and the largest level of types that have all channels in one plane.
_LEVELS = {"u8": (128.0, 128.0), "s16": (0.0, 32768.0), "s32": (0.0, 2147483648.0), "flt": (0.0, 1.0)}


@dataclass(frozen=True)
class Audio:
    """Audio of a clip. pieces: float32 [channels, n] in [-1, 1], one after the other; channels: one or two."""

    pieces: Iterable[Samples]
    channels: int
    rate: int


def channels_of(frame: Any) -> Samples:
    """The samples of a frame [channels, n], of whatever type and layout."""
    channels, type = frame.layout.nb_channels, frame.format.name
    if type in _LEVELS:
        zero, most = _LEVELS[type]
        return np.asarray((frame.to_ndarray().reshape(-1, channels).T - zero) / most, np.float32)
    if frame.format.is_planar and channels <= _NAMED:
        return _converted(frame, "fltp", frame.layout.name)
    # PyAV reads past the planes of more than eight channels; in one plane they are safe.
    return _converted(frame, "flt", frame.layout.name).reshape(-1, channels).T


def stereo(frame: Any) -> Samples:
    """The samples of a frame mixed to two channels: as FFmpeg does where it is known what stands where."""
    layout = frame.layout
    if layout.nb_channels == 2:
        return channels_of(frame)
    if 2 < layout.nb_channels <= _NAMED and "channels" not in layout.name:
        return _converted(frame, "fltp", "stereo")
    return np.repeat(mono(frame), 2, 0)


def mono(frame: Any) -> Samples:
    """The mean of all channels of a frame, [1, n]. Mixed here: FFmpeg would weight them."""
    return np.asarray(channels_of(frame).mean(0, dtype=np.float64, keepdims=True), np.float32)


def _converted(frame: Any, format: str, layout: str) -> Samples:
    resampler = av.AudioResampler(format=format, layout=layout, rate=frame.sample_rate)
    pieces = filter(None, [*resampler.resample(frame), *resampler.resample(None)])
    return np.concatenate([_array(piece) for piece in pieces], 1)


def _array(frame: Any) -> Samples:
    return np.asarray(frame.to_ndarray(), np.float32)


class Resampler:
    """Brings pieces [channels, n] to one rate, whatever rates they have."""

    def __init__(self, rate: int, channels: int) -> None:
        self._rate, self._layout = rate, "mono" if channels == 1 else "stereo"
        self._from, self._resampler = 0, self._new()

    def _new(self) -> av.AudioResampler:
        return av.AudioResampler(format="fltp", layout=self._layout, rate=self._rate)

    def pieces(self, samples: Samples, rate: int) -> Iterator[Samples]:
        """What comes out when samples of that rate go in."""
        if not _SLOWEST <= rate <= _FASTEST:
            raise SkyrunError(f"audio of {rate} samples per second cannot be read", "save it again with 48000")
        if rate != self._from:
            yield from self.rest()
            self._from, self._resampler = rate, self._new()
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=self._layout)
        frame.sample_rate = rate
        yield from map(_array, self._resampler.resample(frame))

    def rest(self) -> Iterator[Samples]:
        """What is still held."""
        yield from map(_array, filter(None, self._resampler.resample(None)))
