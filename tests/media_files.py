"""Video and audio as people have them, written small: numbered frames, tones, clocks that jump, damage."""

from fractions import Fraction

import av
import numpy as np

RATE = 44100
_SAMPLES = 1152  # of an mp2 packet


def numbered(number, height=64, width=96):
    """A frame whose brightness tells its number, up to 60."""
    return np.full((height, width, 3), 4 * number + 8, np.uint8)


def number_of(frame):
    return round((float(frame.mean()) - 7) / 4)


def write_media(
    path, count=20, *, first=0, start=0.0, size=(64, 96), codec="libx264", rate=None, layout="mono", **more
):
    """A video of `count` frames at 25 a second, numbered from `first` on; with a tone beside it if `rate` is given.

    start: seconds at which it begins. more: `format` of the container, `cover` before the video, `mono` samples in
    place of the tone, and attributes of the video's encoder.
    """
    options = {"g": "10", "bf": "0", "crf": "4", "tune": "zerolatency"} if codec == "libx264" else {}
    samples = more.pop("samples", None)
    with av.open(str(path.absolute()), "w", format=more.pop("format", None)) as container:
        cover = None
        if more.pop("cover", False):
            cover = container.add_stream("mjpeg", rate=25)
            cover.height, cover.width, cover.pix_fmt = 48, 48, "yuvj420p"
            cover.codec_context.color_range = 2
            still = av.VideoFrame.from_ndarray(numbered(60, 48, 48), format="rgb24").reformat(format="yuvj420p")
            still.pts, still.time_base = 0, Fraction(1, 25)
        video = container.add_stream(codec, rate=25, options=options)
        video.height, video.width, video.pix_fmt = *size, "yuv420p"
        for name, value in more.items():
            setattr(video.codec_context, name, value)
        audio = container.add_stream("mp2", rate=rate, layout=layout) if rate else None
        if cover:
            container.mux([*cover.encode(still), *cover.encode()])
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(first + number, *size), format="rgb24")
            frame.pts, frame.time_base = round(start * 25) + number, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            wave = tone(count / 25, rate, layout) if samples is None else samples
            _add_audio(container, audio, wave, start)
    return path


def tone(seconds, rate=RATE, layout="mono", frequency=440):
    """int16 [1, n], the channels of a sample side by side."""
    wave = 9000 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)
    return np.repeat(wave.astype(np.int16), 1 if layout == "mono" else 2)[None]


def _add_audio(container, stream, samples, start):
    channels = stream.layout.nb_channels
    for place in range(0, samples.shape[1] // channels, _SAMPLES):
        piece = np.ascontiguousarray(samples[:, place * channels : (place + _SAMPLES) * channels])
        frame = av.AudioFrame.from_ndarray(piece, format="s16", layout=stream.layout.name)
        frame.sample_rate, frame.time_base = stream.rate, Fraction(1, stream.rate)
        frame.pts = round(start * stream.rate) + place
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def joined_files(path, *parts):
    """A file of the bytes of others, as recorders make them."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path
