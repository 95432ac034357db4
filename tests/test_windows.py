"""How long clips are cut into windows, for every length there is."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrun.planning.problems import parse_request
from skyrun.planning.request import Request
from skyrun.tasks import TASKS
from skyrun.tasks.windows import (
    MOTION,
    SPEECH_FPS,
    SPEECH_RATE,
    extension_windows,
    latents,
    padded_frames,
    speech_frame_count,
    speech_windows,
)


@pytest.mark.parametrize("seconds", range(5, 31))
def test_extensions_of_every_length(seconds):
    windows = extension_windows(seconds, 6, 25)
    assert len(windows) == math.ceil(seconds / 5)
    for window in windows:
        assert window.others == 7
        assert window.latents > 0 and (window.latents + window.others) % 8 == 0
        decoded = 1 + 4 * (window.latents + window.others - 1)
        assert window.frames == decoded - 25
    # As long as asked for, and at most a second longer: what is made too much is made up for later.
    assert 0 <= sum(window.latents for window in windows) - 6 * seconds < 8


def test_upstreams_windows_of_extensions():
    five = extension_windows(5, 6, 25)
    assert [(window.latents, window.frames) for window in five] == [(33, 132)]
    golden = extension_windows(8, 2, 9)
    assert [(window.latents, window.others, window.frames) for window in golden] == [(13, 3, 52), (5, 3, 20)]


@given(st.integers(1, 5000), st.sampled_from([41, 81]))
def test_windows_of_speech_of_every_length(frames, size):
    windows = speech_windows(frames, size)
    assert sum(window.frames for window in windows) == frames
    assert all(window.latents == latents(size) for window in windows)
    shown = [window for window in windows if window.frames]
    place = 0  # of the next frame of the clip
    for window in shown:
        assert window.start + window.skip == place  # no gap, and no overlap but what is skipped
        assert window.skip in (0, MOTION)
        assert window.skip + window.frames + window.drop == size
        place += window.frames
    assert place == frames  # the last frame is the last with speech
    if frames < size:
        assert len(windows) == 1
        return
    first, *others = windows
    assert first.guide is None and first.frames == 0
    assert all(window.drop == 12 for window in others[:-1])
    total = padded_frames(windows, size)
    assert (total - size) % (size - 17) == 0 and 0 <= total - frames < size - 17
    guides = [window.guide for window in others]
    assert guides == sorted(guides) and guides[-1] == size - 1
    ends = [index for index in range(size - 1, total, size - 17)]
    assert guides == [round(end * (size - 1) / (total - 1)) for end in ends]


def test_upstreams_windows_of_speech():
    windows = speech_windows(85, 41)
    assert [window.start for window in windows] == [0, 0, 24, 48]
    assert [window.guide for window in windows] == [None, 18, 29, 40]
    assert padded_frames(windows, 41) == 89


@given(st.integers(int(0.4 * SPEECH_RATE), 200 * SPEECH_RATE))
def test_frames_of_speech(samples):
    count = speech_frame_count(samples)
    assert (count - 1) / SPEECH_FPS < samples / SPEECH_RATE <= count / SPEECH_FPS + 1e-9


@pytest.mark.parametrize(("seconds", "condition", "frames"), [(2, 9, 49), (3, 17, 73), (4, 25, 97), (5, 33, 121)])
def test_shots(tmp_path, seconds, condition, frames):
    video = tmp_path / "video.mp4"
    video.touch()
    request = Request("shot", "[CUT_AWAY] a street", video=video, seconds=seconds)
    assert request.condition_frames == condition
    (window,) = request.windows()
    assert (window.frames, window.latents, window.others) == (frames, latents(frames), latents(condition))


@pytest.mark.parametrize("task", TASKS)
def test_steps_are_those_of_the_task(tmp_path, task):
    files = {name: tmp_path / name for name in ("image", "video", "audio")}
    for file in files.values():
        file.touch()
    known = TASKS[task]
    request = Request(
        task,
        "a sea",
        (files["image"],) if known.images[1] else (),
        video=files["video"] if known.video else None,
        audio=files["audio"] if known.audio else None,
    )
    assert parse_request(request.as_json()) == request
    request = request.of(known)  # where several models do a task, their files decide
    assert request.steps == known.steps == {"a2v": 4, "t2v": 30, "i2v": 30}.get(task, 8)
    assert parse_request(request.as_json()) == request
