"""Small videos, recordings and images in many formats, to be damaged."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from skyrun.media.audio import Audio
from skyrun.media.video_writer import Format, writing_video

_RATE = 48000
_VIDEO = {
    "a.ts": "mpeg2video",
    "b.mkv": "ffv1",
    "c.avi": "mjpeg",
    "d.webm": "libvpx",
    "e.h264": "libx264",
    "f.flv": "flv",
}
_PIXELS = {"mjpeg": "yuvj420p", "ffv1": "bgr0"}
_AUDIO = {"a.wav": "pcm_s16le", "b.mp3": "mp3", "c.aac": "aac", "d.flac": "flac", "e.ogg": "libopus", "f.mka": "ac3"}
_CONTAINERS = {".aac": "adts", ".mka": "matroska"}


def clip(path: Path, comment: dict[str, Any]) -> Path:
    """Twelve frames with a tone, as skyrun writes them."""
    rng = np.random.default_rng(0)
    tone = np.sin(np.arange(24000, dtype=np.float32) / 9)[None] / 3
    with writing_video(path, Format(32, 48, Fraction(24), comment, Audio([tone], 1, 24000))) as writer:
        writer.add(rng.integers(0, 255, (12, 32, 48, 3), np.uint8))
    return path


def videos(folder: Path) -> list[Path]:
    """Videos in the formats of _VIDEO, and one of skyrun."""
    paths = [clip(folder / "video.mp4", {"a": "b"})]
    for name, codec in _VIDEO.items():
        paths.append(folder / name)
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream(codec, rate=24)
            stream.height, stream.width, stream.pix_fmt = 32, 48, _PIXELS.get(codec, "yuv420p")
            if codec == "mjpeg":
                stream.codec_context.color_range = 2
            for number in range(8):
                frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * number, np.uint8), format="rgb24")
                container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode())
    return paths


def recordings(folder: Path) -> list[Path]:
    """Recordings in the formats of _AUDIO, and a video with audio."""
    wave = (9000 * np.sin(np.arange(_RATE // 2) / 9)).astype(np.int16)[None]
    paths = [clip(folder / "audio.mp4", {"a": "b"})]
    for name, codec in _AUDIO.items():
        paths.append(folder / name)
        with av.open(str(paths[-1]), "w", format=_CONTAINERS.get(paths[-1].suffix)) as container:
            stream = container.add_stream(codec, rate=_RATE, layout="mono")
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = _RATE, 0, Fraction(1, _RATE)
            container.mux([*stream.encode(frame), *stream.encode()])
    return paths


def images() -> list[bytes]:
    """Images in all formats that are read, and one of 16 bits."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    files = []
    for format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(file, format, **({} if format in ("BMP", "GIF") else {"exif": exif}))
        files.append(file.getvalue())
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(file, "PNG")
    return [*files, file.getvalue()]
