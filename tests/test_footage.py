"""Videos that clips go on from, as people have them."""

from fractions import Fraction

import av
import numpy as np
import pytest
from safetensors.torch import load_file

from skyrun.errors import SkyrunError
from skyrun.media.audio import Audio
from skyrun.media.joined import read_audio, read_frames
from skyrun.media.video_reader import nearest, read_footage
from skyrun.media.video_writer import Format, writing_video


def picture(number, height=32, width=48):
    """A frame whose top left corner is white, and whose brightness tells its number."""
    frame = np.full((height, width, 3), 8 * number + 20, np.uint8)
    frame[: height // 4, : width // 4] = 255
    return frame


def number_of(frame):
    return round((int(frame[-1, -1].mean()) - 20) / 8)


def video(path, count=12, times=None, rate=24, audio=None, **size):
    frames = np.stack([picture(number, **size) for number in range(count)])
    if times is None:
        with writing_video(path, Format(*frames.shape[1:3], Fraction(rate), {}, audio)) as writer:
            writer.add(frames)
        return path
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rotate(path, quarters):
    """Set the matrix of the track's header, as phones do: so many quarter turns clockwise when shown."""
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters]
    one = 1 << 16
    matrix = [cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30]
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_the_last_frames(tmp_path, count):
    footage = read_footage(video(tmp_path / "a.mp4"), count)
    assert [number_of(frame) for frame in footage.frames] == list(range(12))[-count:]
    assert footage.rate == 24


def test_the_last_frames_of_a_long_video(tmp_path):
    """It is not decoded from its beginning, and the frames are the same."""
    path = video(tmp_path / "a.mp4", count=29, rate=Fraction(1, 4))
    assert [number_of(frame) for frame in read_footage(path, 3).frames] == [26, 27, 28]


@pytest.mark.parametrize("quarters", range(4))
def test_phones_record_sideways(tmp_path, quarters):
    path = video(tmp_path / "a.mp4")
    rotate(path, quarters)
    frames = read_footage(path, 2).frames
    assert frames.shape[1:3] == ((48, 32) if quarters % 2 else (32, 48))
    corners = [frames[0][row, col].mean() > 240 for row, col in ((2, 2), (2, -3), (-3, -3), (-3, 2))]
    assert corners == [quarter == quarters for quarter in range(4)]  # clockwise from the top left
    (first, *_) = read_frames(read_footage(path, 2), 32, 32)
    assert first.shape == (1, 32, 32, 3)


def test_too_few_frames(tmp_path):
    with pytest.raises(SkyrunError, match="has 12 frames, 25 are needed to go on from"):
        read_footage(video(tmp_path / "a.mp4"), 25)


@pytest.mark.parametrize("kind", ["text", "sound", "cut", "missing"])
def test_what_is_no_video(tmp_path, kind):
    path = tmp_path / "a.mp4"
    if kind == "text":
        path.write_text("no video")
    if kind == "cut":
        path.write_bytes(video(tmp_path / "b.mp4").read_bytes()[:600])
    if kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    with pytest.raises(SkyrunError, match="not a readable video|no video in it"):
        read_footage(path, 5)


def test_frames_of_varying_rate(tmp_path):
    """The last frames are the last there are; joined, they stay as long as they were."""
    times = [0, 40, 80, 120, 160, 500, 540, 580, 620, 660, 700, 740]
    path = video(tmp_path / "a.mkv", times=times)
    footage = read_footage(path, 3)
    assert [number_of(frame) for frame in footage.frames] == [9, 10, 11]
    shown = [number_of(frame[0]) for frame in read_frames(footage, 32, 48)]
    assert sorted(shown) == shown and shown[-1] == 11
    assert shown.count(4) > 3  # the one that was shown longest


def test_odd_sizes_are_made_nearest(goldens):
    golden = goldens("preprocess/process_video")
    assert np.array_equal(nearest(golden["in.prefix_u8"].numpy(), 48, 32), golden["out.raw_u8"].numpy())


def test_nearest_is_torchs_in_every_size():
    import torch

    rng = np.random.default_rng(0)
    for _ in range(200):
        have, want = rng.integers(1, 2000, 2)
        frames = np.arange(have, dtype=np.float32).reshape(1, have, 1, 1)
        expected = torch.nn.functional.interpolate(torch.from_numpy(frames[..., 0].transpose(0, 2, 1)), size=int(want))
        assert np.array_equal(nearest(frames, int(want), 1).ravel(), expected.numpy().ravel()), (have, want)


def test_audio_of_a_video(tmp_path):
    wave = np.sin(np.arange(24000) / 20).astype(np.float32)
    path = video(tmp_path / "a.mp4", audio=Audio([np.stack((wave, -wave)) * 0.5], 2, 48000))
    audio = read_audio(path)
    samples = np.concatenate(list(audio.pieces), 1)
    assert audio.rate == 48000 and len(samples) == audio.channels == 2
    assert samples.shape[1] == pytest.approx(24000, abs=1100)
    got = samples[0, 2000:20000]
    assert np.corrcoef(got, wave[2000:20000])[0, 1] > 0.999
    assert read_audio(video(tmp_path / "b.mp4")) is None


def test_prefixes_are_upstreams(goldens):
    for case in ("single_shot_extension", "shot_switching_extension"):
        golden = goldens(f"e2e/{case}/golden")
        expected = load_file(golden.folder / "golden.safetensors")["out.prefix_frames_u8"].numpy()
        footage = read_footage(golden.folder / "input.mp4", len(expected))
        difference = abs(nearest(footage.frames, *expected.shape[1:3]).astype(int) - expected)
        assert difference.max() <= 2  # decoders may differ
