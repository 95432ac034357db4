"""Videos that clips go on from, as people have them."""

import re
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import RATE, joined_files, numbered, tone, write_media
from media_files import number_of as told
from safetensors.torch import load_file

import skyrun
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


def two_parts(folder, **second):
    """Twenty frames with audio, and twenty more of another recording behind them in the same file."""
    parts = write_media(folder / "1.ts", rate=RATE), write_media(folder / "2.ts", first=20, **{"rate": RATE} | second)
    return joined_files(folder / "a.ts", *parts)


def gap(path):
    """Forty frames without audio, an hour between the first twenty and the others."""
    times = [40 * number + (3_600_000 if number > 19 else 0) for number in range(40)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(folder):
    """A recording that was begun in the middle of a group of ten frames; three packets say what is in it."""
    data = write_media(folder / "1.ts", 40, rate=RATE).read_bytes()
    packets = [data[place : place + 188] for place in range(0, len(data), 188)]
    begins = [number for number, packet in enumerate(packets) if packet[1:3] == bytes([0x41, 0])]  # frames of the video
    (folder / "a.ts").write_bytes(b"".join([*packets[:3], *packets[begins[1] :]]))
    return folder / "a.ts"


def damaged(folder):
    """Two frames of noise in an AVI, whose frames are images one by one."""
    path = write_media(folder / "a.avi", 40, codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(path.read_bytes())
    places = [place for place in range(len(data)) if data[place : place + 4] == b"00dc"]
    for place in places[11], places[31]:  # the first is in the header
        data[place + 8 : place + 648] = bytes(640)
    path.write_bytes(data)
    return path


def other_size(folder):
    parts = write_media(folder / "1.ts"), write_media(folder / "2.ts", first=20, size=(96, 64))
    return joined_files(folder / "a.ts", *parts)


ALL = range(40)
# How a recording is made; the frames that a joined clip has of it; seconds of audio; the shape; what is said.
RECORDINGS = {
    "as it should be": (lambda folder: write_media(folder / "a.mkv", 40, rate=RATE), ALL, 1.6, (64, 96), ""),
    "a jump by an hour": (lambda folder: two_parts(folder, start=3600), ALL, 1.6, (64, 96), ""),
    "a jump by a minute": (lambda folder: two_parts(folder, start=60), ALL, 1.6, (64, 96), ""),
    "time runs backwards": (lambda folder: two_parts(folder, start=0), ALL, 1.6, (64, 96), ""),
    "a little backwards": (lambda folder: two_parts(folder, start=0.72), ALL, 1.6, (64, 96), ""),
    "jump, no audio": (lambda folder: gap(folder / "a.mkv"), ALL, None, (64, 96), ""),
    "jump in mp4": (lambda folder: gap(folder / "a.mp4"), ALL, None, (64, 96), ""),
    "another rate of audio": (
        lambda folder: two_parts(folder, start=0.8, rate=48000, layout="stereo"),
        ALL,
        1.6,
        (64, 96),
        "",
    ),
    "another size": (other_size, ALL, None, (64, 96), ""),
    "oblong pixels": (
        lambda folder: write_media(folder / "a.mp4", 40, sample_aspect_ratio=Fraction(5, 4)),
        ALL,
        None,
        (64, 120),
        "",
    ),
    "absurd pixels": (
        lambda folder: write_media(folder / "a.mp4", 40, sample_aspect_ratio=Fraction(5000, 1)),
        ALL,
        None,
        (64, 96),
        "",
    ),
    "a cover": (lambda folder: write_media(folder / "a.mkv", 40, cover=True, rate=RATE), ALL, 1.6, (64, 96), ""),
    "cut at its beginning": (cut, range(10, 40), 1.2, (64, 96), "9 damaged pieces were skipped"),
    "damage": (
        damaged,
        [n - (n in (10, 30)) for n in ALL],
        None,
        (64, 96),
        "2 damaged pieces were skipped",
    ),
    "raw": (lambda folder: write_media(folder / "a.h264", 40, format="h264"), ALL, None, (64, 96), ""),
    "no average rate": (lambda folder: write_media(folder / "a.ts", 40, codec="mpeg1video"), ALL, None, (64, 96), ""),
    "HLG": (lambda folder: write_media(folder / "a.mp4", 40, color_trc=18), ALL, None, (64, 96), "it is HDR (HLG)"),
    "PQ": (lambda folder: write_media(folder / "a.mkv", 40, color_trc=16), ALL, None, (64, 96), "it is HDR (PQ)"),
    "a colon": (lambda folder: write_media(folder / "take1:2.mp4", 40), ALL, None, (64, 96), ""),
}


@pytest.mark.parametrize("kind", RECORDINGS)
def test_recordings(tmp_path, monkeypatch, kind):
    make, numbers, seconds, shape, said = RECORDINGS[kind]
    monkeypatch.chdir(tmp_path)
    footage = read_footage(make(tmp_path).relative_to(tmp_path), 25, lambda height, width: (height // 2, width // 2))
    assert footage.shape == shape and footage.rate == 25
    assert footage.frames.shape == (25, shape[0] // 2, shape[1] // 2, 3)
    assert [told(frame) for frame in footage.frames] == sorted(set(numbers))[-25:]
    notices = []
    assert [told(frame) for frame in read_frames(footage, 32, 48, notices)] == list(numbers)
    assert said in "".join((*footage.notices, *notices)) and bool(said) == bool(footage.notices or notices)
    audio = read_audio(footage.path)
    assert (audio is None) == (seconds is None)
    if audio is not None:
        samples = np.concatenate(list(audio.pieces), 1)
        assert samples.shape[1] / audio.rate == pytest.approx(seconds, abs=0.06)
        level = np.sqrt(np.mean(samples[:, 4000:-4000] ** 2))
        assert level == pytest.approx(9000 / 32768 / np.sqrt(2), rel=0.05)


def test_a_still_that_audio_goes_on_over_is_no_jump(tmp_path):
    """A slide that is shown for half a minute while somebody talks stays for half a minute."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=5), container.add_stream("mp2", rate=RATE, layout="mono")
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        for number in [*range(20), *range(150, 170)]:
            frame = av.VideoFrame.from_ndarray(numbered(number % 150), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 5)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for place in range(0, 34 * RATE, 1152):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, place, Fraction(1, RATE)
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    footage = read_footage(path, 5)
    shown = sum(1 for _ in read_frames(footage, 32, 48))
    assert shown / float(footage.rate) == pytest.approx(34, abs=0.5)
    assert sum(piece.shape[1] for piece in read_audio(path).pieces) / RATE == pytest.approx(34, abs=0.1)


@pytest.mark.parametrize(("rate", "expected"), [(44100, 44100), (22254, 48000), (37800, 48000), (96000, 96000)])
def test_rates_that_aac_lacks(tmp_path, rate, expected):
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for number in range(25):
            container.mux(video.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(tone(1, rate), format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux([*audio.encode(frame), *audio.encode()])
    audio, clip = read_audio(path), tmp_path / "clip.mp4"
    assert audio.rate == expected
    with writing_video(clip, Format(64, 96, Fraction(25), {}, audio)) as writer:
        writer.add(np.stack([numbered(number) for number in range(25)]))
    (samples,) = [np.concatenate(list(read_audio(clip).pieces), 1)[0]]
    spectrum = abs(np.fft.rfft(samples[:expected]))
    assert spectrum.argmax() * expected / min(len(samples), expected) == pytest.approx(440, abs=2)


def test_a_video_in_which_nothing_can_be_read(tmp_path):
    data = write_media(tmp_path / "a.ts", 8, rate=RATE).read_bytes()
    packets = [data[place : place + 188] for place in range(0, len(data), 188)]
    begins = [number for number, packet in enumerate(packets) if packet[1:3] == bytes([0x41, 0])]
    (tmp_path / "b.ts").write_bytes(b"".join([*packets[:3], *packets[begins[1] :]]))
    with pytest.raises(SkyrunError, match="has 0 frames, 5 are needed to go on from; .*7 damaged pieces were skipped"):
        read_footage(tmp_path / "b.ts", 5)


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
REFUSED = {
    "playlist": (PLAYLIST.encode(), "not a readable video"),
    "list of files": (b"ffconcat version 1.0\nfile '/etc/hostname'\n", "its format is not supported"),
    "stream of the network": (SDP.encode(), "not a readable video"),
    "empty": (b"", "not a readable video"),
    "text": (b"hello" * 100, "not a readable video"),
    "image": (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "not a readable video"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path, kind):
    content, message = REFUSED[kind]
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(SkyrunError, match=message) as caught:
        read_footage(tmp_path / "a.mp4", 5)
    assert "MP4" in caught.value.hint and "a.mp4" in caught.value.message
    with pytest.raises(SkyrunError, match="is a folder"):
        read_footage(tmp_path, 5)


def test_damage_anywhere_is_a_sentence_or_a_video(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "b.mp4"
    for name in ("a.mp4", "a.mkv", "a.ts", "a.avi"):
        codec = {"codec": "mpeg4"} if name.endswith("avi") else {}
        whole = write_media(tmp_path / name, 12, rate=RATE, **codec).read_bytes()
        for _ in range(25):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), rng.integers(1, 60)):
                data[place] = rng.integers(256)
            path.write_bytes(data[: rng.integers(1, len(data)) if rng.random() < 0.3 else None])
            try:
                footage = read_footage(path, 5, lambda *shape: (32, 48))
                count = sum(1 for _ in islice(read_frames(footage, 32, 48), 200))
                audio = read_audio(path)
                assert count and (audio is None or all(piece.ndim == 2 for piece in islice(audio.pieces, 200)))
            except SkyrunError as error:
                assert "b.mp4" in error.message


def test_files_are_opened_in_one_place():
    """Where they are checked: nothing else hands a path to FFmpeg or to Pillow."""
    root = Path(skyrun.__file__).parent
    for call, places in {
        # The last two write clips and windows; a run reads its own windows back.
        r"\bav\.open\(": {"media/container.py", "media/video_writer.py", "engine/window_files.py"},
        r"\bImage\.open\(": {"media/image.py"},
    }.items():
        found = {str(path.relative_to(root)) for path in root.rglob("*.py") if re.search(call, path.read_text())}
        assert found == places
