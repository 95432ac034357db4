"""Read speech from any file with audio, at the rate and loudness that the audio encoder was trained with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skyrun.errors import SkyrunError
from skyrun.media.audio import Resampler, Samples, channels_of
from skyrun.media.container import Track, opened
from skyrun.media.loudness import loudness, normalised

_CANCELLED = 0.1  # share of the power that independent channels would have after mixing
_QUIET = 1e-5  # an inaudible RMS amplitude


@dataclass(frozen=True)
class Speech:
    """Speech of one channel. samples: [n] at the requested rate, at -23 LUFS. notices: sentences for the user."""

    samples: NDArray[np.float64]
    notices: tuple[str, ...] = ()


def read_speech(path: Path, rate: int, limits: tuple[float, float], seconds: float | None = None) -> Speech:
    """Read a file's speech: the mean of all channels, or the loudest channel if they cancel each other.

    Raises SkyrunError if the file has no audio, or too little or too much.

    Args:
        path: A file with audio.
        rate: Samples per second of the result.
        limits: The least and the most seconds.
        seconds: If given, how many seconds from the beginning to read.
    """
    most = limits[1] if seconds is None else seconds
    recording = _Recording(path, rate, most)
    samples = recording.mixed()
    notices = [f"{path}: {recording.damage}"] if recording.damage else []
    if recording.cancels:
        samples = recording.channel(recording.loudest)
        notices.append(
            f"{path}: its channels cancel each other when they are mixed; "
            f"channel {recording.loudest + 1} of {recording.channels} is used alone"
        )
    if seconds is not None:
        samples = samples[: int(seconds * rate)]
    _check(path, samples, rate, limits, recording.damage)
    wave = samples.astype(np.float64)
    if np.sqrt(np.mean(wave**2)) < _QUIET or not np.isfinite(loudness(wave, rate)):
        notices.append(f"{path} is silent: the mouth will hardly move")
    return Speech(normalised(wave, rate), tuple(notices))


def _check(path: Path, samples: Samples, rate: int, limits: tuple[float, float], damage: str) -> None:
    length, (shortest, longest) = len(samples) / rate, limits
    if not shortest <= length <= longest:
        hint = f"--seconds {longest:g} takes the beginning" if length > longest else "give a longer recording"
        what = f"{path} has {length:.1f} s of audio, expected {shortest:g} to {longest:g} s"
        raise SkyrunError(f"{what}; {damage}" if damage else what, hint)
    if not np.isfinite(samples).all():
        raise SkyrunError(f"{path} has samples that are infinite or NaN", "save it again as 16-bit WAV")


class _Recording:
    """An audio file that is read once, or a second time for one of its channels."""

    def __init__(self, path: Path, rate: int, seconds: float) -> None:
        self._path, self._rate = path, rate
        self._most = (seconds + 1) * rate  # samples to read: one more second shows that the file is too long
        self._power, self._mixed = np.zeros(0), 0.0
        self.damage = ""

    @property
    def channels(self) -> int:
        return len(self._power)

    @property
    def loudest(self) -> int:
        return int(self._power.argmax())

    @property
    def cancels(self) -> bool:
        """Whether mixing leaves much less than it does of channels that have nothing to do with each other."""
        return self.channels > 1 and self._mixed < _CANCELLED * float(self._power.sum()) / self.channels**2

    def mixed(self) -> Samples:
        """The mean of all channels, at the rate wanted."""
        return self._read(None)

    def channel(self, index: int) -> Samples:
        """One of them; the last where there are fewer."""
        return self._read(index)

    def _read(self, index: int | None) -> Samples:
        pieces, got = [np.zeros((1, 0), np.float32)], 0
        with opened(self._path, "recording") as container:
            track = Track.audio(self._path, container)
            for piece in self._resampled(track, index):
                pieces.append(piece)
                got += piece.shape[1]
                if got > self._most:
                    break
            self.damage = track.damage
        return np.concatenate(pieces, 1).reshape(-1)

    def _resampled(self, track: Track, index: int | None) -> Iterator[Samples]:
        resampler = Resampler(self._rate, 1)
        for frame in track.frames():
            channels = channels_of(frame)
            # Mixed here: FFmpeg would weight them.
            one = channels.mean(0, dtype=np.float64) if index is None else channels[min(index, len(channels) - 1)]
            if index is None:
                self._measure(channels, one)
            yield from resampler.pieces(one[None].astype(np.float32), frame.sample_rate)
        yield from resampler.rest()

    def _measure(self, channels: Samples, mixed: NDArray[np.float64]) -> None:
        self._power = np.pad(self._power, (0, max(0, len(channels) - len(self._power))))
        self._power[: len(channels)] += np.square(channels, dtype=np.float64).sum(1)
        self._mixed += float(np.square(mixed).sum())
