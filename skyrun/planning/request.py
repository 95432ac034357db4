"""What a user asks for, as a value. Constructing one never looks at the file system."""

import re
import reprlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from skyrun.kernels.disk import is_possible
from skyrun.tasks import TASKS, TaskSpec
from skyrun.tasks.windows import Length, Window, latents

SECONDS = 5.0  # length of a clip if the user gives none
PLACES = ("video", "audio", "output", "model", "save_latents")
_OPTIONS = frozenset().union(*(spec.options for spec in TASKS.values()))
_TOO_LARGE = 1 << 64
_WHOLE, _NUMBER, _TEXT, _PATH, _FLAG = (int,), (int, float), (str,), (str, Path), (bool,)
_EXPECTED: dict[tuple[type, ...], str] = {
    _WHOLE: "a whole number",
    _NUMBER: "a number",
    _TEXT: "text",
    _PATH: "a path",
    _FLAG: "True or False",
}
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("frames", "seed", "steps", "condition_frames", "latent_rate", "window_frames"), _WHOLE),
    **dict.fromkeys(("seconds", "max_vram", "max_ram"), _NUMBER),
    **dict.fromkeys(("quant", "device", "dtype", "precision", "attention", "prefer", "transition"), _TEXT),
    **dict.fromkeys(("task", "prompt", "resolution"), _TEXT),
    **dict.fromkeys(("join", "overwrite"), _FLAG),
    **dict.fromkeys(("video", "audio", "output", "model", "save_latents"), _PATH),
}
_REQUIRED = ("task", "prompt", "resolution", "latent_rate", "window_frames", "join", "overwrite")


@dataclass(frozen=True)
class Request:
    """A clip to make.

    task: "r2v" makes a clip that shows what is in one to four `images`, "v2v" continues a `video`, "shot" makes the
    next shot after a `video`, and "a2v" makes a portrait speak what is in `audio`.
    output: the mp4 file; None keeps the frames in memory only. model: a folder of converted files, or one of them.
    quant: which transformer to use if the folder has several. size: (height, width) in pixels, or "HxW"; without it,
    `resolution` chooses one with the aspect ratio of the first image or the video. frames: 4 k + 1. seconds: the length
    if `frames` is not given, five by default; of speech, how much of its beginning is used. seed: None draws one.
    precision: of linear layers, "exact" or "fast" (int8); attention: "exact", "int8", "full-int8" or "fp8"; None leaves
    them to the plan, but where `precision` is "exact" attention is too. prefer: "balanced", "quality", "speed" or
    "memory".
    max_vram, max_ram: limits in GiB. save_latents: a file for the latents. overwrite: whether existing files may be
    replaced.
    transition: name of one of the task's transitions, which puts its tag before the prompt. join: whether the clip
    begins with the video.
    Only tests change how windows are cut: condition_frames is how many frames of the video are conditioned on,
    latent_rate how many latent frames make a second, window_frames how long the windows of a talking avatar are.

    Invalid values are stored as they are; `skyrun.planning.problems` lists them.
    """

    task: str
    prompt: str
    images: tuple[Path, ...] = ()
    output: Path | None = None
    model: Path | None = None
    quant: str | None = None
    size: tuple[int, int] | str | None = None
    resolution: str = "480P"
    frames: int | None = None
    seconds: float | None = None
    steps: int = None  # type: ignore[assignment]  # by default as many as the task's model was distilled for
    seed: int | None = None
    device: str | None = None
    dtype: str | None = None
    precision: str | None = None
    attention: str | None = None
    prefer: str | None = None
    max_vram: float | None = None
    max_ram: float | None = None
    save_latents: Path | None = None
    overwrite: bool = False
    video: Path | None = None
    audio: Path | None = None
    transition: str | None = None
    join: bool = False
    condition_frames: int = None  # type: ignore[assignment]  # by default as many as upstream uses
    latent_rate: int = Length.latent_rate
    window_frames: int = Length.window_frames

    def __post_init__(self) -> None:
        """Normalise every value to the form that the rest of the code expects, unless its type is wrong."""
        if self.type_problems():
            return

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        images = (self.images,) if isinstance(self.images, (str, Path)) else self.images
        put("images", tuple(Path(image) for image in images))
        for name in PLACES:
            if getattr(self, name) is not None:
                put(name, Path(getattr(self, name)))
        if self.size is not None:
            put("size", _parse_size(self.size) if isinstance(self.size, str) else tuple(self.size))
        put("resolution", self.resolution.upper())
        if self.quant is not None:
            put("quant", self.quant.upper())
        if self.task in TASKS:
            self._fill_in(TASKS[self.task], put)

    def _fill_in(self, spec: TaskSpec, put: Any) -> None:
        if self.steps is None:
            put("steps", spec.steps)
        if self.condition_frames is None:
            seconds = SECONDS if self.seconds is None else self.seconds
            put("condition_frames", spec.condition_frames(self.frame_count if abs(seconds) < 1e6 else 1))
        if (tag := spec.transitions.get(self.transition or "")) is not None:
            put("prompt", self.prompt if self.prompt.startswith(tag) else f"{tag} {self.prompt.lstrip()}")

    @property
    def spec(self) -> TaskSpec:
        """The task's TaskSpec."""
        return TASKS[self.task]

    @property
    def frame_count(self) -> int:
        """Frames of the clip."""
        return (
            self.spec.frame_count(SECONDS if self.seconds is None else self.seconds)
            if self.frames is None
            else self.frames
        )

    @property
    def latent_frames(self) -> int:
        """Latent frames of the clip, without references."""
        return latents(self.frame_count)

    def windows(self, speech_frames: int = 0) -> tuple[Window, ...]:
        """The windows of the clip, in order. speech_frames: how many frames the speech of a talking avatar takes."""
        length = Length(
            frames=self.frame_count,
            seconds=int(SECONDS if self.seconds is None else self.seconds),
            images=max(1, len(self.images)),
            condition_frames=self.condition_frames,
            latent_rate=self.latent_rate,
            window_frames=self.window_frames,
            speech_frames=speech_frames,
        )
        return self.spec.windows(length)

    def type_problems(self) -> list[str]:
        """Values of a wrong type; no other check can be made on them."""
        values = [(name, getattr(self, name), kind) for name, kind in _KINDS.items()]
        values = [(name, value, kind) for name, value, kind in values if value is not None or name in _REQUIRED]
        images: Any = self.images
        values += [("image", image, _PATH) for image in (images if isinstance(images, (list, tuple)) else (images,))]
        size: Any = self.size
        is_pair = isinstance(size, (list, tuple)) and len(size) == 2
        if is_pair:
            values += [("size", side, _WHOLE) for side in size]
        elif size is not None and not isinstance(size, str):
            return [f"size is {reprlib.repr(size)}, expected height and width, such as (480, 832)"]
        return [problem for name, value, kind in values if (problem := _type_problem(name, value, kind))]

    def absolute(self) -> "Request":
        """The same request with absolute paths."""
        places = {name: getattr(self, name) for name in PLACES}
        whole = {name: path.absolute() for name, path in places.items() if path is not None}
        return replace(self, images=tuple(path.absolute() for path in self.images), **whole)

    def as_json(self) -> dict[str, Any]:
        """The values that are set, as plain values."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if (
                value is None
                or value is False
                or field.name == "overwrite"
                or (field.name == "resolution" and self.size)
            ):
                continue
            if field.name in _OPTIONS and (field.name not in self.spec.options or value == field.default):
                continue
            if isinstance(value, Path):
                value = str(value)
            elif isinstance(value, tuple):
                value = [str(item) if isinstance(item, Path) else item for item in value]
            values[field.name] = value
        return values


def _type_problem(name: str, value: Any, kind: tuple[type, ...]) -> str:
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        return f"{name} is a number of more than 19 digits"
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not _FLAG):
        return f"{name} is {reprlib.repr(value)}, expected {_EXPECTED[kind]}"
    if isinstance(value, (str, Path)) and "\0" in str(value):
        return f"{name} has a NUL character in it"
    if kind is _PATH and not is_possible(Path(str(value))):
        return f"{name} is {reprlib.repr(str(value))}, which no file can be called"
    return ""


def _parse_size(text: str) -> tuple[int, int] | str:
    """ "480x832" -> (480, 832), height first. Text that is not a size is returned unchanged, for the error message."""
    match = re.fullmatch(r"(\d{1,6})\s*[xX×*]\s*(\d{1,6})", text.strip())
    return (int(match[1]), int(match[2])) if match else text
