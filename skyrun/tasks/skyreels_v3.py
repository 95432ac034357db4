"""The four tasks of SkyReels-V3."""

from types import MappingProxyType

from skyrun.tasks.sizes import BUCKETS, PORTRAIT_BUCKETS
from skyrun.tasks.spec import ENCODERS, TaskSpec
from skyrun.tasks.windows import (
    SPEECH_FPS,
    Length,
    Window,
    extension_windows,
    frames_of,
    reference_window,
    shot_window,
    speech_windows,
)

MAX_REFERENCES = 4
CONNECTION = "a person is talking"  # the prompt of a talking avatar's later windows
_MAX_LATENT_FRAMES = 1024 - MAX_REFERENCES  # the model has 1024 positions on the time axis, references included
_MOST_FRAMES = frames_of(_MAX_LATENT_FRAMES)
_FPS = 24
_CONDITION_FRAMES = 25  # last frames of a video that its extension is conditioned on

WAN_14B = MappingProxyType({"dim": 5120, "ffn": 13824, "in": 16, "out": 16, "freq": 256, "text": 4096})
_AVATAR = MappingProxyType(
    {
        **WAN_14B,
        **{"in": 36, "image": 1280, "audio_window": 5, "middle_window": 8, "audio_features": 12 * 768},
        **{"audio_hidden": 512, "audio_dim": 768, "context_tokens": 32},
    }
)

# The first two tags are documented by the model's authors; the others are used by its users.
TRANSITIONS = MappingProxyType(
    {
        "cut-in": "[ZOOM_IN_CUT]",
        "cut-out": "[ZOOM_OUT_CUT]",
        "shot-reverse-shot": "[SHOT_REVERSE_SHOT]",
        "multi-angle": "[MULTI_ANGLE]",
        "cut-away": "[CUT_AWAY]",
    }
)


def _condition_frames(frames: int) -> int:
    return _CONDITION_FRAMES


def _shot_condition_frames(frames: int) -> int:
    """How many frames the next shot is conditioned on: more for a longer shot."""
    return min(33, max(9, 8 * round((frames - 1) / _FPS) - 7))


def _reference(length: Length) -> tuple[Window, ...]:
    return reference_window(length.frames, length.images, MAX_REFERENCES)


def _extension(length: Length) -> tuple[Window, ...]:
    return extension_windows(length.seconds, length.latent_rate, length.condition_frames)


def _shot(length: Length) -> tuple[Window, ...]:
    return shot_window(length.frames, length.condition_frames)


def _speech(length: Length) -> tuple[Window, ...]:
    return speech_windows(length.speech_frames, length.window_frames)


REFERENCE_TO_VIDEO = TaskSpec(
    name="r2v",
    does="a clip that shows what is in one to four images",
    pipeline="reference_to_video",
    fps=_FPS,
    steps=8,
    shift=5.0,
    sampler="unipc",
    seconds=(0.0, (_MOST_FRAMES - 1) // _FPS),
    buckets=BUCKETS,
    windows=_reference,
    dims=WAN_14B,
    encoded=frozenset({"text", "pictures"}),
    condition_frames=_condition_frames,
    images=(1, MAX_REFERENCES),
    image_name="reference images",
    takes_frames=True,
    most_frames=_MOST_FRAMES,
)

VIDEO_EXTENSION = TaskSpec(
    name="v2v",
    does="how a video goes on, 5 to 30 seconds of it",
    pipeline="video_extension",
    fps=_FPS,
    steps=8,
    shift=8.0,
    sampler="unipc",
    seconds=(5, 30),
    buckets=BUCKETS,
    windows=_extension,
    dims=WAN_14B,
    encoded=frozenset({"text"}),
    condition_frames=_condition_frames,
    video=True,
    whole_seconds=True,
    windowed=True,
    options=frozenset({"join", "condition_frames", "latent_rate"}),
)

SHOT_SWITCHING = TaskSpec(
    name="shot",
    does="the next shot after a video, 2 to 5 seconds of it",
    pipeline="shot_switching",
    fps=_FPS,
    steps=8,
    shift=8.0,
    sampler="unipc",
    seconds=(2, 5),
    buckets=BUCKETS,
    windows=_shot,
    dims=WAN_14B,
    encoded=frozenset({"text", "video"}),
    condition_frames=_shot_condition_frames,
    video=True,
    whole_seconds=True,
    takes_frames=True,
    most_frames=_MOST_FRAMES,
    options=frozenset({"join", "transition", "condition_frames"}),
    transitions=TRANSITIONS,
)

TALKING_AVATAR = TaskSpec(
    name="a2v",
    does="a portrait that says what a recording says",
    pipeline="talking_avatar",
    fps=SPEECH_FPS,
    steps=4,
    shift=11.0,
    sampler="euler",
    seconds=(0.4, 200),
    buckets=PORTRAIT_BUCKETS,
    windows=_speech,
    dims=_AVATAR,
    encoded=frozenset({"text"}),
    condition_frames=_condition_frames,
    images=(1, 1),
    image_name="portraits",
    audio=True,
    windowed=True,
    options=frozenset({"window_frames"}),
    parts=(*ENCODERS, "image encoder", "audio encoder"),
)
