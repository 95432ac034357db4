"""Clips longer than the models make at once are made window by window. The arithmetic is upstream's."""

import math
from dataclasses import dataclass

from skyrun.request import Request
from skyrun.tasks import MAX_REFERENCES, WINDOW_FRAMES

_SPLIT = 5  # seconds of a window of an extension
_MULTIPLE = 8  # the frames of its sequence
MOTION, _DROP = 5, 12  # frames of a talking avatar's window: shared with the one before, and thrown away at its end
GUIDES = 5  # frames at its end that show where it is to arrive


@dataclass(frozen=True)
class Window:
    """latents: frames of noise. others: latent frames that stand beside them. frames: of the clip that it makes.

    Of a talking avatar: start: the first frame of speech. skip, drop: frames at its beginning that the window before
    has made, and at its end that are worse than the others. guide: the frame of the first window that shows where this
    one is to arrive, None in the first.
    """

    latents: int
    others: int
    frames: int
    start: int = 0
    skip: int = 0
    drop: int = 0
    guide: int | None = None


def windows_of(request: Request, speech_frames: int = 0) -> tuple[Window, ...]:
    """The windows of a request, in order. speech_frames: of a talking avatar, as long as its speech is."""
    match request.task:
        case "v2v":
            return extension_windows(request.whole_seconds, request.latent_rate, request.condition_frames)
        case "a2v":
            return speech_windows(speech_frames, request.window_frames)
        case _:
            return (single_window(request.task, request.frame_count, request.condition_frames),)


def single_window(task: str, frames: int, condition_frames: int) -> Window:
    """Of a clip that is made at once, beside its references or what is before the cut."""
    return Window(latents(frames), MAX_REFERENCES if task == "r2v" else latents(condition_frames), frames)


def amounts(
    task: str, windows: tuple[Window, ...], condition_frames: int, pictures: int = 1, size: int = WINDOW_FRAMES
) -> dict[str, int]:
    """What a workload says of a clip: frames, windows, and how many frames the autoencoder encodes and decodes.

    size: frames of a talking avatar's windows.
    """
    encoded = {"r2v": pictures, "a2v": len(windows) * size}.get(task, len(windows) * condition_frames)
    sequences = [window.latents + window.others for window in windows]
    decoded = {"v2v": sum(1 + 4 * (count - 1) for count in sequences), "a2v": len(windows) * size}
    frames = sum(window.frames for window in windows)
    return {
        "frames": frames,
        "latent_frames": max(sequences),
        "windows": len(windows),
        "encoded_frames": encoded,
        "decoded_frames": decoded.get(task, frames),
        "windowed": task in ("v2v", "a2v"),
    }


def latents(frames: int) -> int:
    """Latent frames of so many frames: one for the first, one for every four after it."""
    return 1 + (frames - 1) // 4


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
        windows.append(Window(count, before, 4 * count))
    return tuple(windows)


def speech_windows(frames: int, size: int) -> tuple[Window, ...]:
    """Windows of `size` frames over `frames` frames of speech.

    The first window is no part of a clip that is longer than it: it shows the others where they are to arrive. They
    share five frames with the one before and throw away twelve at the end, all but the last.
    """
    if frames < size:
        return (Window(latents(size), 0, frames, drop=size - frames),)
    stride = size - MOTION - _DROP
    count = math.ceil((frames - size) / stride) + 1
    end = (count - 1) * stride + size - 1  # the last frame, with speech or after it
    windows = [Window(latents(size), 0, 0)]
    for index in range(count):
        start, last = index * stride, index == count - 1
        skip, drop = MOTION if index else 0, end + 1 - frames if last else _DROP
        guide = round((start + size - 1) * (size - 1) / end)  # halves to even
        windows.append(Window(latents(size), 0, size - skip - drop, start, skip, drop, guide))
    return tuple(windows)


def padded_frames(windows: tuple[Window, ...], size: int) -> int:
    """Frames of speech that windows of a talking avatar see, with those after its end."""
    return windows[-1].start + size
