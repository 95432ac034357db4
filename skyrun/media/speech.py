"""Speech: read from any file with sound, brought to the rate and level that the audio encoder was trained with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from skyrun.errors import SkyrunError
from skyrun.media.loudness import normalised
from skyrun.tasks import TASKS
from skyrun.tasks.windows import SPEECH_RATE

_SHORTEST, _LONGEST = TASKS["a2v"].seconds


def read_speech(path: Path, seconds: float | None = None) -> NDArray[np.float64]:
    """Samples [n] at 16 kHz, all channels mixed, at -23 LUFS. seconds: only the first of them.

    SkyrunError if the file has no sound, or less than 0.4 s or more than 200 s of it.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise SkyrunError(f"{path} has no sound in it", "give a recording of speech to --audio")
            samples = np.concatenate([np.zeros(0, np.float32), *_mono(container, seconds)])
    except (av.FFmpegError, OSError) as error:
        raise SkyrunError(f"{path} is no readable recording: {error}", "use WAV, MP3, M4A or a video") from error
    if seconds is not None:
        samples = samples[: int(seconds * SPEECH_RATE)]
    length = len(samples) / SPEECH_RATE
    if not _SHORTEST <= length <= _LONGEST:
        hint = f"--seconds {_LONGEST:g} takes the beginning" if length > _LONGEST else "give a longer recording"
        raise SkyrunError(f"{path} has {length:.1f} s of sound, expected {_SHORTEST:g} to {_LONGEST:g} s", hint)
    if not np.isfinite(samples).all():
        raise SkyrunError(f"{path} has samples that are no numbers", "save it again as 16-bit WAV")
    return normalised(samples.astype(np.float64), SPEECH_RATE)


def _mono(container: Any, seconds: float | None) -> Iterator[NDArray[np.float32]]:
    """The mean of all channels, piece by piece. Mixed here: FFmpeg would weight them."""
    resampler, got = None, 0
    most = _LONGEST if seconds is None else seconds
    for frame in _frames(container):
        if resampler is None:
            if frame is None:
                return
            resampler = av.AudioResampler(format="fltp", layout=frame.layout.name, rate=SPEECH_RATE)
        for piece in resampler.resample(frame):
            mixed = piece.to_ndarray().mean(0, dtype=np.float64).astype(np.float32)
            got += len(mixed)
            yield mixed
        if got > (most + 1) * SPEECH_RATE:  # enough to know that it is too long, or to cut
            return


def _frames(container: Any) -> Iterator[Any]:
    yield from container.decode(audio=0)
    yield None  # what the resampler still holds
