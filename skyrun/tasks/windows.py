"""Clips longer than the models make at once are made window by window. The arithmetic is upstream's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FRAMES_PER_LATENT = 4  # after the first, which is one frame
SPEECH_RATE = 16000  # samples per second
SPEECH_FPS = 25
MOTION, _DROP = 5, 12  # frames of a talking avatar's window: shared with the one before, and thrown away at its end
GUIDES = 5  # frames at its end that show where it is to arrive
_SPLIT = 5  # seconds of a window of an extension
_MULTIPLE = 8  # the latent frames of its sequence


@dataclass(frozen=True)
class Length:
    """What decides the windows of a clip; each task looks at some of it.

    frames: of the clip. seconds: whole ones. images: that it is made from. condition_frames: of the video that are
    seen. latent_rate: latent frames per second. window_frames: of a talking avatar's windows. speech_frames: frames
    that its speech takes.
    """

    frames: int = 0
    seconds: int = 0
    images: int = 1
    condition_frames: int = 0
    latent_rate: int = 6
    window_frames: int = 81
    speech_frames: int = 0


@dataclass(frozen=True)
class Window:
    """latents: latent frames of noise. others: latent frames beside them. frames: of the clip that it makes.

    encoded, decoded: frames that pass through the autoencoder. Of a talking avatar: start: the first frame of speech.
    skip, drop: frames at its beginning that the window before has made, and at its end that are worse than the others.
    guide: the frame of the first window that shows where this one is to arrive, None in the first.
    """

    latents: int
    others: int
    frames: int
    encoded: int
    decoded: int
    start: int = 0
    skip: int = 0
    drop: int = 0
    guide: int | None = None


def latents(frames: int) -> int:
    """Latent frames of so many frames: one for the first, one for every four after it."""
    return 1 + (frames - 1) // FRAMES_PER_LATENT


def frames_of(latent_frames: int) -> int:
    """Frames that so many latent frames decode to."""
    return 1 + FRAMES_PER_LATENT * (latent_frames - 1)


def speech_frame_count(samples: int) -> int:
    """Frames of video that so many samples of speech take; the last may have less sound than the others."""
    return math.ceil(samples / SPEECH_RATE * SPEECH_FPS)


def amounts(windows: Sequence[Window]) -> dict[str, int]:
    """What a workload says of a clip: frames, windows, and how many frames the autoencoder encodes and decodes."""
    return {
        "frames": sum(window.frames for window in windows),
        "latent_frames": max(window.latents + window.others for window in windows),
        "windows": len(windows),
        "encoded_frames": sum(window.encoded for window in windows),
        "decoded_frames": sum(window.decoded for window in windows),
    }


def reference_window(frames: int, images: int, references: int) -> tuple[Window, ...]:
    """Of a clip that is made at once, beside `references` latent frames of which `images` hold an image."""
    return (Window(latents(frames), references, frames, images, frames),)


def shot_window(frames: int, condition_frames: int) -> tuple[Window, ...]:
    """Of a clip that is made at once, beside the frames before the cut."""
    return (Window(latents(frames), latents(condition_frames), frames, condition_frames, frames),)


def extension_windows(seconds: int, rate: int, condition_frames: int) -> tuple[Window, ...]:
    """Windows of five seconds and what is left, each after the last `condition_frames` frames of what was there.

    rate: latent frames per second. A window's sequence is a multiple of eight latent frames. What is made too much
    for that, later windows make less if it is enough for them to come down to a multiple.
    """
    before, spare, windows = latents(condition_frames), 0, []
    for start in range(0, seconds, _SPLIT):
        count = rate * min(_SPLIT, seconds - start)
        over = (count + before) % _MULTIPLE
        change = _MULTIPLE - over if over > spare else -over
        count, spare = count + change, spare + change
        decoded = frames_of(count + before)
        windows.append(Window(count, before, FRAMES_PER_LATENT * count, condition_frames, decoded))
    return tuple(windows)


def speech_windows(frames: int, size: int) -> tuple[Window, ...]:
    """Windows of `size` frames over `frames` frames of speech.

    The first window is no part of a clip that is longer than it: it shows the others where they are to arrive. They
    share five frames with the one before and throw away twelve at the end, all but the last.
    """
    if frames < size:
        return (Window(latents(size), 0, frames, size, size, drop=size - frames),)
    stride = size - MOTION - _DROP
    count = math.ceil((frames - size) / stride) + 1
    end = (count - 1) * stride + size - 1  # the last frame, with speech or after it
    windows = [Window(latents(size), 0, 0, size, size)]
    for index in range(count):
        start, last = index * stride, index == count - 1
        skip, drop = MOTION if index else 0, end + 1 - frames if last else _DROP
        guide = round((start + size - 1) * (size - 1) / end)  # halves to even
        windows.append(Window(latents(size), 0, size - skip - drop, size, size, start, skip, drop, guide))
    return tuple(windows)


def padded_frames(windows: Sequence[Window], size: int) -> int:
    """Frames of speech that windows of a talking avatar see, with those after its end."""
    return windows[-1].start + size
