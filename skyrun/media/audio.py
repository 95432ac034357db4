"""Audio samples: mix any number of channels to one or two, and resample them to one rate."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from skyrun.errors import SkyrunError

Samples = NDArray[np.float32]  # [channels, n]
_MIN_RATE, _MAX_RATE = 1000, 1_000_000  # samples per second
_MAX_CHANNELS = 8  # that FFmpeg has layouts for and PyAV reads from separate planes
# Zero and full scale of the sample formats that have all channels in one plane.
_LEVELS = {"u8": (128.0, 128.0), "s16": (0.0, 32768.0), "s32": (0.0, 2147483648.0), "flt": (0.0, 1.0)}


@dataclass(frozen=True)
class Audio:
    """Audio of a clip. pieces: consecutive samples, float32 [channels, n] in [-1, 1]. channels: one or two."""

    pieces: Iterable[Samples]
    channels: int
    rate: int


def channels_of(frame: Any) -> Samples:
    """The samples [channels, n] of a frame of any sample format and layout."""
    channels, type = frame.layout.nb_channels, frame.format.name
    if type in _LEVELS:
        zero, most = _LEVELS[type]
        return np.asarray((frame.to_ndarray().reshape(-1, channels).T - zero) / most, np.float32)
    if frame.format.is_planar and channels <= _MAX_CHANNELS:
        return _converted(frame, "fltp", frame.layout.name)
    # With more channels PyAV reads past the planes; from one plane it reads correctly.
    return _converted(frame, "flt", frame.layout.name).reshape(-1, channels).T


def stereo(frame: Any) -> Samples:
    """Mix a frame to two channels, as FFmpeg does if the layout is known; otherwise both are the mean of all."""
    layout = frame.layout
    if layout.nb_channels == 2:
        return channels_of(frame)
    if 2 < layout.nb_channels <= _MAX_CHANNELS and "channels" not in layout.name:
        return _converted(frame, "fltp", "stereo")
    return np.repeat(mono(frame), 2, 0)


def mono(frame: Any) -> Samples:
    """The mean of all channels of a frame, [1, n]. FFmpeg would weight the channels differently."""
    return np.asarray(channels_of(frame).mean(0, dtype=np.float64, keepdims=True), np.float32)


def _converted(frame: Any, format: str, layout: str) -> Samples:
    resampler = av.AudioResampler(format=format, layout=layout, rate=frame.sample_rate)
    pieces = filter(None, [*resampler.resample(frame), *resampler.resample(None)])
    return np.concatenate([_array(piece) for piece in pieces], 1)


def _array(frame: Any) -> Samples:
    return np.asarray(frame.to_ndarray(), np.float32)


class Resampler:
    """Resamples pieces [channels, n] to one rate; their own rates may change between pieces."""

    def __init__(self, rate: int, channels: int) -> None:
        self._rate, self._layout = rate, "mono" if channels == 1 else "stereo"
        self._input_rate, self._resampler = 0, self._new()

    def _new(self) -> av.AudioResampler:
        return av.AudioResampler(format="fltp", layout=self._layout, rate=self._rate)

    def pieces(self, samples: Samples, rate: int) -> Iterator[Samples]:
        """Resample some samples. The result may lag behind; `rest` returns what is missing."""
        if not _MIN_RATE <= rate <= _MAX_RATE:
            raise SkyrunError(f"audio of {rate} samples per second cannot be read", "save it again with 48000")
        if rate != self._input_rate:
            yield from self.rest()
            self._input_rate, self._resampler = rate, self._new()
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=self._layout)
        frame.sample_rate = rate
        yield from map(_array, self._resampler.resample(frame))

    def rest(self) -> Iterator[Samples]:
        """The samples that the resampler still holds."""
        yield from map(_array, filter(None, self._resampler.resample(None)))
