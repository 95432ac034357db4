"""Clips on disk: the right frames, the right colours, and where they came from."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest

from skyrun.errors import SkyrunError
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
