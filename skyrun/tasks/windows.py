"""Cut clips that are longer than a model can make at once into windows. The arithmetic is that of upstream."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FRAMES_PER_LATENT = 4  # except for the first latent frame, which stands for one frame
SPEECH_RATE = 16000  # samples per second
SPEECH_FPS = 25
MOTION, _DROP = 5, 12  # frames of a talking avatar's window that it shares with the one before, and drops at its end
BLOCK = 5  # latent frames that share a timestep if those of diffusion forcing are staggered
GUIDES = 5  # frames at the end of such a window that are set to its guide frame
_SPLIT = 5  # seconds of an extension's window
_MULTIPLE = 8  # the latent frames of an extension's sequence are a multiple of it


@dataclass(frozen=True)
class Length:
    """What determines the windows of a clip. Each task uses some of the fields.

    frames: of the clip. seconds: its whole seconds. images: how many it is made from. condition_frames: how many frames
    of the video it is conditioned on. latent_rate: latent frames per second. window_frames: length of a window of
    a talking avatar, or of diffusion forcing. speech_frames: how many frames the speech takes.
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
    """A window of a clip.

    latents: noisy latent frames. others: latent frames beside them in the sequence. frames: of the clip that the window
    makes. encoded, decoded: frames that the VAE encodes and decodes. stills: whether it encodes them one by one.
    The rest is for talking avatars. start: the window's first frame of speech. skip: frames at its beginning that the
    window before has made. drop: frames at its end that are not used because they are worse. guide: index of its guide
    frame in the first window, None for the first window.
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
    stills: bool = False


def latents(frames: int) -> int:
    """Latent frames of `frames` frames: one for the first, and one for every four after it."""
    return 1 + (frames - 1) // FRAMES_PER_LATENT


def frames_of(latent_frames: int) -> int:
    """Frames that `latent_frames` decode to."""
    return 1 + FRAMES_PER_LATENT * (latent_frames - 1)


def speech_frame_count(samples: int) -> int:
    """Frames of video for that many samples of speech. The audio may end within the last frame."""
    return math.ceil(samples / SPEECH_RATE * SPEECH_FPS)


def amounts(windows: Sequence[Window]) -> dict[str, int | bool]:
    """The fields of a Workload that follow from the windows of a clip."""
    return {
        "frames": sum(window.frames for window in windows),
        "latent_frames": max(window.latents + window.others for window in windows),
        "windows": len(windows),
        "encoded_frames": sum(window.encoded for window in windows),
        "stills": all(window.stills for window in windows),
        "decoded_frames": sum(window.decoded for window in windows),
    }


def reference_window(frames: int, images: int, references: int) -> tuple[Window, ...]:
    """The window of a clip that is made at once, with `references` latent frames, of which `images` hold an image."""
    return (Window(latents(frames), references, frames, images, frames, stills=True),)


def whole_window(frames: int, encoded: int = 0) -> tuple[Window, ...]:
    """The window of a clip that is made at once. encoded: frames that the VAE encodes for it."""
    return (Window(latents(frames), 0, frames, encoded, frames),)


def forcing_windows(frames: int, size: int, history: int, given: int) -> tuple[Window, ...]:
    """Windows of at most `size` frames of a clip made by diffusion forcing.

    Each but the first goes on from the last `history` frames of the one before, which it encodes and decodes again.

    Args:
        frames: of the clip.
        size: of a window.
        history: frames that a window is conditioned on.
        given: frames that the clip begins with.
    """
    total, most, before = latents(frames), latents(size), latents(history)
    first = min(total, most)
    windows = [Window(first - given, given, frames_of(first), given, frames_of(first))]
    done = first
    while done < total:
        new = min(total - done, most - before)
        windows.append(Window(new, before, FRAMES_PER_LATENT * new, history, frames_of(before + new)))
        done += new
    return tuple(windows)


def shot_window(frames: int, condition_frames: int) -> tuple[Window, ...]:
    """The window of a clip that is made at once, conditioned on the frames before the cut."""
    return (Window(latents(frames), latents(condition_frames), frames, condition_frames, frames),)


def extension_windows(seconds: int, rate: int, condition_frames: int) -> tuple[Window, ...]:
    """Windows of five seconds and one for the rest, each conditioned on the last `condition_frames` frames before it.

    A window's sequence is a multiple of eight latent frames. It is rounded up, which makes spare frames; once there are
    enough spare frames, a later window is rounded down.

    Args:
        seconds: length of the extension.
        rate: latent frames per second.
        condition_frames: frames that a window is conditioned on.
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
    """Windows of `size` frames for `frames` frames of speech.

    If the clip is longer than a window, the first window is not part of it: it only makes the guide frames of the
    others. These share five frames with the window before, and all but the last drop twelve frames at the end.
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
        guide = round((start + size - 1) * (size - 1) / end)  # halves are rounded to even
        windows.append(Window(latents(size), 0, size - skip - drop, size, size, start, skip, drop, guide))
    return tuple(windows)


def padded_frames(windows: Sequence[Window], size: int) -> int:
    """Frames of speech that the windows of a talking avatar cover, including those after the end of the speech."""
    return windows[-1].start + size
