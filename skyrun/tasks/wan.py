"""Text to video and image to video with SkyReels-V2 and Wan 2.1, and what each of the models was trained with.

Steps, shifts, guidance, lengths and negative prompts are those that the models' authors publish with their code.
"""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from skyrun.tasks.sizes import BUCKETS, Buckets, same_area
from skyrun.tasks.spec import ENCODERS, TaskSpec
from skyrun.tasks.windows import Length, Window, forcing_windows, frames_of, whole_window

_14B = MappingProxyType({"dim": 5120, "ffn": 13824, "in": 16, "out": 16, "freq": 256, "text": 4096, "layers": 40})
_1_3B = MappingProxyType({**_14B, "dim": 1536, "ffn": 8960, "layers": 30})
_SEES_IMAGE = MappingProxyType({"in": 36, "image": 1280})
_MOST_FRAMES = frames_of(1024)  # the models have 1024 positions on the time axis

_WAN_BUCKETS: Buckets = MappingProxyType(
    {
        "480P": {"0.58": (480, 832), "1.73": (832, 480)},
        "720P": {"0.56": (720, 1280), "1.78": (1280, 720)},
    }
)

_NEGATIVE = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)
_WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_SHAKING = "镜头晃动，"


def _no_condition(frames: int) -> int:
    return 1


def _from_text(length: Length) -> tuple[Window, ...]:
    return whole_window(length.frames)


def _from_image(length: Length) -> tuple[Window, ...]:
    return whole_window(length.frames, encoded=length.frames)


def _forced_from_text(length: Length) -> tuple[Window, ...]:
    return forcing_windows(length.frames, length.window_frames, length.condition_frames, 0)


def _forced_from_image(length: Length) -> tuple[Window, ...]:
    return forcing_windows(length.frames, length.window_frames, length.condition_frames, 1)


def _history(frames: int) -> int:
    """How many frames of the window before a window goes on from."""
    return 17


TEXT_TO_VIDEO = TaskSpec(
    name="t2v",
    does="a clip of what the prompt says",
    pipeline="text_to_video",
    model="t2v",
    title="SkyReels-V2-T2V-14B-540P",
    fps=24,
    steps=30,
    shift=8.0,
    guidance=6.0,
    negative=_NEGATIVE,
    sampler="unipc",
    seconds=(0.0, (_MOST_FRAMES - 1) // 24),
    usual_seconds=4.0,
    buckets=BUCKETS,
    resolution="540P",
    windows=_from_text,
    dims=_14B,
    encoded=frozenset({"text"}),
    condition_frames=_no_condition,
    takes_frames=True,
    most_frames=_MOST_FRAMES,
    options=frozenset({"guidance", "shift"}),
)
IMAGE_TO_VIDEO = replace(
    TEXT_TO_VIDEO,
    name="i2v",
    does="a clip that begins with an image",
    pipeline="image_to_video",
    model="i2v",
    title="SkyReels-V2-I2V-14B-540P",
    shift=5.0,
    guidance=5.0,
    windows=_from_image,
    dims=MappingProxyType({**_14B, **_SEES_IMAGE}),
    encoded=frozenset({"text", "image", "picture"}),
    images=(1, 1),
    image_name="images",
    parts=(*ENCODERS, "image encoder"),
)

_LARGE: dict[str, Any] = {"usual_seconds": 5.0, "resolution": "720P"}
_WAN: dict[str, Any] = {
    "fps": 16,
    "shift": 5.0,
    "guidance": 5.0,
    "usual_seconds": 5.0,
    "buckets": _WAN_BUCKETS,
    "resolution": "480P",
    "seconds": (0.0, (_MOST_FRAMES - 1) // 16),
}
_WAN_TEXT = replace(TEXT_TO_VIDEO, steps=50, negative=_WAN_NEGATIVE, **_WAN)
_WAN_IMAGE = replace(
    IMAGE_TO_VIDEO,
    steps=40,
    small_shift=3.0,
    negative=_SHAKING + _WAN_NEGATIVE,
    sizing=same_area,
    image_fit="whole",
    **_WAN,
)

_FORCED: dict[str, Any] = {  # diffusion forcing: any length, in windows that go on from each other
    "pipeline": "diffusion_forcing",
    "sampler": "forcing",
    "title": "SkyReels-V2-DF-14B-540P",
    "model": "df",
    "negative": _WAN_NEGATIVE,
    "seconds": (0.0, 300.0),
    "most_frames": None,
    "windowed": True,
    "window_frames": 97,
    "condition_frames": _history,
    "options": TEXT_TO_VIDEO.options | {"window_frames", "condition_frames", "ar_step"},
}
_LARGE_FORCED: dict[str, Any] = {**_LARGE, "model": "df-720p", "title": "SkyReels-V2-DF-14B-720P", "window_frames": 121}
_SMALL_FORCED: dict[str, Any] = {
    "model": "df-1.3b",
    "title": "SkyReels-V2-DF-1.3B-540P",
    "dims": MappingProxyType({**_1_3B, "rates": 2}),
    "rates": (24, 16),
}
_TEXT_FORCED = replace(TEXT_TO_VIDEO, windows=_forced_from_text, **_FORCED)
_IMAGE_FORCED = replace(
    IMAGE_TO_VIDEO,
    windows=_forced_from_image,
    dims=_14B,
    encoded=frozenset({"text", "image"}),
    parts=ENCODERS,
    image_fit="bicubic",
    file_task="t2v",
    **_FORCED,
)

WAN_SPECS = (
    TEXT_TO_VIDEO,
    replace(TEXT_TO_VIDEO, model="t2v-720p", title="SkyReels-V2-T2V-14B-720P", **_LARGE),
    replace(_WAN_TEXT, model="wan2.1-t2v-14b", title="Wan2.1-T2V-14B"),
    replace(_WAN_TEXT, model="wan2.1-t2v-1.3b", title="Wan2.1-T2V-1.3B", shift=8.0, guidance=6.0, dims=_1_3B),
    _TEXT_FORCED,
    replace(_TEXT_FORCED, **_LARGE_FORCED),
    replace(_TEXT_FORCED, **_SMALL_FORCED),
    IMAGE_TO_VIDEO,
    replace(IMAGE_TO_VIDEO, model="i2v-720p", title="SkyReels-V2-I2V-14B-720P", **_LARGE),
    replace(
        IMAGE_TO_VIDEO,
        model="i2v-1.3b",
        title="SkyReels-V2-I2V-1.3B-540P",
        dims=MappingProxyType({**_1_3B, **_SEES_IMAGE}),
    ),
    replace(_WAN_IMAGE, model="wan2.1-i2v-480p", title="Wan2.1-I2V-14B-480P"),
    replace(_WAN_IMAGE, model="wan2.1-i2v-720p", title="Wan2.1-I2V-14B-720P", resolution="720P"),
    _IMAGE_FORCED,
    replace(_IMAGE_FORCED, **_LARGE_FORCED),
    replace(_IMAGE_FORCED, **_SMALL_FORCED),
)
