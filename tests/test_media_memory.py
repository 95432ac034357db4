"""Hostile media in bounded memory: in a process that may take little more than it has."""

import io
import subprocess
import sys
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from test_image import chunk, png_of, png_with
from test_speech import WAVE, wav

pytest.importorskip("resource")

_LIMITED = """
import resource, sys
from pathlib import Path
from skyrun.media.image import open_image
from skyrun.media.joined import read_audio, read_frames
from skyrun.media.speech import read_speech
from skyrun.media.video_reader import read_footage
from skyrun.errors import SkyrunError

READ = {
    "image": lambda path: open_image(path).size,
    "speech": lambda path: len(read_speech(path, 16000, (0.4, 200), 5.0).samples),
    "video": lambda path: read_footage(path, 9, lambda *shape: (480, 832)).shape,
    "joined": lambda path: sum(1 for _ in read_frames(read_footage(path, 9, lambda *s: (48, 80)), 48, 80)),
    "audio": lambda path: sum(piece.shape[1] for piece in read_audio(path).pieces),
}
for line in sys.stdin:
    path, read, megabytes = line.rstrip().split("\\t")
    (now,) = [int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize")]
    resource.setrlimit(resource.RLIMIT_AS, (now + (int(megabytes) << 20), resource.RLIM_INFINITY))
    try:
        print("read", READ[read](Path(path)), flush=True)
    except SkyrunError as error:
        print("refused", error, flush=True)
"""


def large_video(path, height, width, count=9):
    """Of a color, so that it takes a few kB."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast", "crf": "40"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes([100]) * plane.buffer_size)
        for number in range(count):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def long_silence(path):
    """Ten minutes of silence in a video of a second, in a few kB."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=24)
        video.height, video.width, video.pix_fmt = 48, 80, "yuv420p"
        audio = container.add_stream("flac", rate=48000, layout="stereo")
        for _ in range(24):
            container.mux(video.encode(av.VideoFrame(80, 48, "yuv420p")))
        container.mux(video.encode())
        silence = np.zeros((1, 2 * 48000), np.int16)
        for second in range(600):
            frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 48000 * second, Fraction(1, 48000)
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return path


def bomb(path, format, size):
    data = io.BytesIO()
    Image.new("1", size).save(data, format)
    path.write_bytes(data.getvalue())
    return path


def text_bomb(path):
    path.write_bytes(png_with(*[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 25)))] * 12))
    return path


def header(path, width, height):
    path.write_bytes(png_of(width, height))
    return path


# How it is made, what reads it, in how many MB, and what comes of it.
HOSTILE = {
    "8K": (lambda folder: large_video(folder / "a.mp4", 4320, 7680), "video", 900, "read (4320, 7680)"),
    "8K, joined": (lambda folder: folder / "a.mp4", "joined", 900, "read 9"),
    "67 million pixels": (lambda folder: large_video(folder / "b.mp4", 8192, 8192, 1), "video", 900, "refused"),
    "ten minutes of silence": (lambda folder: long_silence(folder / "a.mkv"), "audio", 300, "read 28800000"),
    "the beginning of it": (lambda folder: folder / "a.mkv", "speech", 300, "read 80000"),
    "200 channels": (lambda folder: wav(folder / "a.wav", [WAVE] * 200), "speech", 300, "read 24000"),
    "gif": (lambda folder: bomb(folder / "a.gif", "GIF", (12000, 12000)), "image", 600, "refused"),
    "tiff": (lambda folder: bomb(folder / "a.tiff", "TIFF", (13000, 13000)), "image", 600, "refused"),
    "png": (lambda folder: bomb(folder / "a.png", "PNG", (13000, 13000)), "image", 600, "refused"),
    "png, huge": (lambda folder: header(folder / "b.png", 1 << 30, 1 << 30), "image", 600, "refused"),
    "png, as large as may be": (lambda folder: bomb(folder / "c.png", "PNG", (8000, 8000)), "image", 900, "read"),
    "text": (lambda folder: text_bomb(folder / "d.png"), "image", 600, "refused"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("hostile"), []
    for make, read, megabytes, _ in HOSTILE.values():
        path = make(folder)
        assert path.stat().st_size < 25e6
        lines.append(f"{path}\t{read}\t{megabytes}\n")
    command = [sys.executable, "-c", _LIMITED]
    done = subprocess.run(command, input="".join(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(HOSTILE, done.stdout.splitlines(), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", HOSTILE)
def test_memory_is_bounded(outcomes, kind):
    assert outcomes[kind].startswith(HOSTILE[kind][3])
