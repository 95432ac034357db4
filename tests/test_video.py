"""Clips on disk: the right frames, the right colours, and where they came from."""

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from skyrun.errors import SkyrunError
from skyrun.media.audio import Audio
from skyrun.media.video_writer import Format, read_request, writing_video

FORMAT = Format(48, 80, Fraction(24), {})


def gradient(frames, height=48, width=80):
    """Smooth colours that move: what 4:2:0 can carry."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack(
        [np.stack((x * 3, y * 5, np.full_like(x, 40 + 4 * t)), -1).clip(0, 255).astype(np.uint8) for t in range(frames)]
    )


def written(path, frames, request):
    with writing_video(path, Format(*frames.shape[1:3], Fraction(24), request)) as writer:
        writer.add(frames[:1])
        writer.add(frames[1:])


def test_frames_come_back_in_their_colours(tmp_path):
    frames = gradient(9)
    written(tmp_path / "clip.mp4", frames, {})
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 24)
        back = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert back.shape == frames.shape
    assert abs(back.astype(int) - frames).mean() < 4


def test_the_request_survives_and_a_remux_keeps_it(tmp_path):
    request = {"prompt": 'quotes "and" \n lines, 日本語', "seed": 7}
    written(tmp_path / "a.mp4", gradient(5), request)
    assert read_request(tmp_path / "a.mp4") == request
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "b.mp4"), "w") as target:
        target.metadata.update(source.metadata)
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert read_request(tmp_path / "b.mp4") == request


def test_a_clip_of_others_has_no_request(tmp_path):
    written(tmp_path / "clip.mp4", gradient(1), {})
    with av.open(str(tmp_path / "plain.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.metadata["comment"] = json.dumps([1])
    assert read_request(tmp_path / "plain.mp4") is None
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(SkyrunError, match="is not a readable video"):
        read_request(tmp_path / "text.mp4")


def test_a_failure_while_writing_leaves_the_old_clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), writing_video(path, FORMAT) as writer:
        writer.add(gradient(3))
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SkyrunError, match="cannot write"), writing_video(tmp_path / "file" / "x.mp4", FORMAT):
        pass


def commented(path, comment):
    """A clip with a comment of these bytes, which a line of as many letters held the place of."""
    with writing_video(path, Format(48, 80, Fraction(24), {"p": "x" * len(comment)})) as writer:
        writer.add(gradient(1))
    data, place = path.read_bytes(), json.dumps({"p": "x" * len(comment)}).encode()
    assert data.count(place) == 1
    path.write_bytes(data.replace(place, comment + b" " * (len(place) - len(comment))))
    return path


COMMENTS = {
    "a request": (b'{"task": "r2v", "images": ["a.png"], "seed": 18446744073709551615}', {"seed"}),
    "other text": (b"filmed on a Sunday", None),
    "a list": (b"[1, 2]", None),
    "half of one": (b'{"task": "r2v", "pro', None),
    "not UTF-8": (b"\xff\xfe\x80 caf\xe9", None),
    "not UTF-8 in a value": (b'{"task": "r2v", "prompt": "caf\xe9"}', {"prompt"}),
    "not a number": (b'{"task": "r2v", "seconds": NaN}', None),
    "deep": (b'{"task": ' + b"[" * 5000 + b"]" * 5000 + b"}", "lists within lists"),
    "rather deep": (b'{"task": ' + b"[" * 30 + b"]" * 30 + b"}", "lists within lists"),
    "deep dicts": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "lists within lists"),
    "NUL": (b'{"task": "r2v", "video": "a\\u0000.mp4"}', "a NUL in it"),
    "NUL in a name": (b'{"a\\u0000": 1}', "a NUL in it"),
    "400 digits": (b'{"task": "r2v", "seconds": 1' + b"0" * 400 + b"}", "a number of absurd size"),
    "10,000 digits": (b'{"task": "r2v", "seconds": 1' + b"0" * 10000 + b"}", None),
    "a large exponent": (b'{"task": "r2v", "seconds": 1e999}', "a number of absurd size"),
    "two megabytes": (b'{"task": "' + b"x" * (2 << 20) + b'"}', None),
}


@pytest.mark.parametrize("kind", COMMENTS)
def test_what_a_comment_may_say(tmp_path, kind):
    comment, expected = COMMENTS[kind]
    path = commented(tmp_path / "take1:2.MP4", comment)
    if isinstance(expected, str):
        with pytest.raises(SkyrunError, match=f"says how it was made with .*{expected}"):
            read_request(path)
    else:
        request = read_request(path)
        assert (request is None) == (expected is None)
        assert request is None or expected <= set(request)


def test_names_with_colons_and_capitals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("take1:2.mp4", "C.MP4", "http:x.mp4"):
        written(Path(name), gradient(2), {"name": name})
        assert read_request(Path(name)) == {"name": name}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["C.MP4", "http:x.mp4", "take1:2.mp4"]


def test_the_file_is_there_before_the_first_frame(tmp_path):
    with writing_video(tmp_path / "a.mp4", FORMAT) as writer:
        (partial,) = tmp_path.iterdir()
        assert partial.name.endswith(".partial")
        writer.add(gradient(1))
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(SkyrunError, match="cannot write"), writing_video(tmp_path / "closed" / "a.mp4", FORMAT):
        pytest.fail("work would begin")


def test_audio_ends_with_the_frames(tmp_path):
    """However long it is and in whatever pieces it comes; what is too short stays as it is."""
    for seconds, expected in ((9, 1), (0.5, 0.5)):
        wave = np.sin(np.arange(int(48000 * seconds)) / 20).astype(np.float32)[None]
        pieces = np.split(wave, [7, 7, 5000, 5001, 20000], axis=1)
        with writing_video(tmp_path / "a.mp4", Format(48, 80, Fraction(24), {}, Audio(pieces, 1, 48000))) as writer:
            for frame in gradient(24):
                writer.add(frame[None])
        with av.open(str(tmp_path / "a.mp4")) as container:
            samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        assert len(samples) / 48000 == pytest.approx(expected, abs=0.03)
        assert np.corrcoef(samples[2000:20000], wave[0, 2000:20000])[0, 1] > 0.99
