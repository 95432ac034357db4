"""What a user asks for, as a value. Constructing one never looks at the file system."""

import re
import reprlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from skyrun.kernels.files.disk import is_possible
from skyrun.planning.lora import Lora, as_lora, lora_problem
from skyrun.tasks import MODELS, TASKS, TaskSpec, spec_of
from skyrun.tasks.windows import BLOCK, Length, Window, latents

# Fields that mean the same for every task; what the others say is about one task, or about its model.
SHARED = (
    *("task", "prompt", "seed", "prefer", "device", "devices", "dtype", "precision", "attention"),
    *("max_vram", "max_ram", "output", "save_latents", "overwrite"),
)
_BY_MODEL = ("steps", "guidance", "negative_prompt", "shift", "condition_frames", "window_frames")
PLACES = ("video", "audio", "output", "model", "save_latents")
_OPTIONS = frozenset().union(*(spec.options for models in MODELS.values() for spec in models))
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
    **dict.fromkeys(
        ("frames", "seed", "steps", "condition_frames", "latent_rate", "window_frames", "fps", "ar_step", "devices"),
        _WHOLE,
    ),
    **dict.fromkeys(("seconds", "max_vram", "max_ram", "guidance", "nag", "shift"), _NUMBER),
    **dict.fromkeys(("quant", "device", "dtype", "precision", "attention", "prefer", "transition"), _TEXT),
    **dict.fromkeys(("task", "prompt", "resolution", "negative_prompt", "variant"), _TEXT),
    **dict.fromkeys(("join", "overwrite"), _FLAG),
    **dict.fromkeys(("video", "audio", "output", "model", "save_latents"), _PATH),
}
_REQUIRED = ("task", "prompt", "latent_rate", "window_frames", "ar_step", "join", "overwrite", "devices")


@dataclass(frozen=True)
class Request:
    """A clip to make.

    task: "r2v" makes a clip that shows what is in one to four `images`, "v2v" continues a `video`, "shot" makes the
    next shot after a `video`, "a2v" makes a portrait speak what is in `audio`, "t2v" makes a clip from the prompt
    alone, and "i2v" one that begins with an image.
    output: the mp4 file; None keeps the frames in memory only. model: a folder of converted files, or one of them.
    quant: which transformer to use if the folder has several. size: (height, width) in pixels, or "HxW"; without it,
    `resolution` chooses one with the aspect ratio of the first image or the video. frames: 4 k + 1. seconds: the length
    if `frames` is not given, by default what the model was trained for; of speech, how much of its beginning is used.
    seed: None draws one.
    precision: of linear layers, "exact" or "fast" (int8); attention: "exact", "int8", "full-int8" or "fp8",
    "sparse:P%" or both with a comma, which skips what costs an error of at most P percent; None leaves
    them to the plan, but where `precision` is "exact" attention is too. prefer: "balanced", "quality", "speed" or
    "memory".
    devices: how many GPUs, or processes of a CPU, make the clip together, each within the limits. max_vram, max_ram:
    limits in GiB. save_latents: a file for the latents. overwrite: whether existing files may be replaced.
    loras: adapters, each a path, "PATH:STRENGTH", (path, strength) or a Lora.
    negative_prompt: what the clip shall not show. guidance: scale of classifier-free guidance; 1 does without it.
    shift: of the sigmas. fps: frames per second, where a model has several. Without them the model's own values count.
    nag: scale of normalized attention guidance, above 1, such as 11; it makes use of the negative prompt where guidance
    is 1 or built into the model. variant: the name of the model, found from its files. ar_step: by how many steps each
    block of frames of a window lags behind the one before, where the model was trained with diffusion forcing.
    transition: name of one of the task's transitions, which puts its tag before the prompt. join: whether the clip
    begins with the video.
    Only tests change how windows are cut: condition_frames is how many frames of the video, or of the window before,
    are conditioned on, latent_rate how many latent frames make a second, window_frames how long the windows of a
    talking avatar and of diffusion forcing are.

    Invalid values are stored as they are; `skyrun.planning.problems` lists them.
    """

    task: str
    prompt: str
    images: tuple[Path, ...] = ()
    output: Path | None = None
    model: Path | None = None
    quant: str | None = None
    size: tuple[int, int] | str | None = None
    resolution: str = None  # type: ignore[assignment]  # by default the usual one of the task's model
    frames: int | None = None
    seconds: float | None = None
    steps: int = None  # type: ignore[assignment]  # by default as many as the task's model was distilled for
    seed: int | None = None
    device: str | None = None
    devices: int = 1
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
    loras: tuple[Lora, ...] = ()
    negative_prompt: str | None = None
    guidance: float | None = None
    nag: float | None = None
    shift: float | None = None
    fps: int | None = None
    variant: str | None = None
    ar_step: int = 0
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
        put("loras", tuple(as_lora(lora) for lora in self.loras))
        for name in PLACES:
            if getattr(self, name) is not None:
                put(name, Path(getattr(self, name)))
        if self.size is not None:
            put("size", _parse_size(self.size) if isinstance(self.size, str) else tuple(self.size))
        if self.resolution is not None:
            put("resolution", self.resolution.upper())
        if self.quant is not None:
            put("quant", self.quant.upper())
        if self.task in TASKS:
            self._fill_in(TASKS[self.task], put)

    def _fill_in(self, spec: TaskSpec, put: Any) -> None:
        if self.variant is not None or len(MODELS[self.task]) == 1:  # else the model's files decide
            self._fill_in_model(self.spec, put)
        if (tag := spec.transitions.get(self.transition or "")) is not None:
            put("prompt", self.prompt if self.prompt.startswith(tag) else f"{tag} {self.prompt.lstrip()}")

    def _fill_in_model(self, spec: TaskSpec, put: Any) -> None:
        usual: dict[str, Any] = {"steps": spec.steps, "resolution": spec.resolution}
        if "guidance" in spec.options:
            usual |= {"guidance": spec.guidance, "negative_prompt": spec.negative}
        if "shift" in spec.options:
            size = self.size if isinstance(self.size, tuple) else None
            usual["shift"] = spec.shift_of(self.resolution or spec.resolution, size)
        for name, value in usual.items():
            if getattr(self, name) is None:
                put(name, value)
        if self.window_frames == Length.window_frames:
            put("window_frames", spec.window_frames)
        if self.condition_frames is None:
            put("condition_frames", spec.condition_frames(self.frame_count if abs(self.length) < 1e6 else 1))

    @property
    def spec(self) -> TaskSpec:
        """The TaskSpec of the task with the request's model, or with the usual one."""
        return spec_of(self.task, self.variant)

    @property
    def length(self) -> float:
        """Seconds of the clip."""
        return self.spec.usual_seconds if self.seconds is None else self.seconds

    @property
    def frame_count(self) -> int:
        """Frames of the clip."""
        return self.spec.frame_count(self.length, self.fps) if self.frames is None else self.frames

    @property
    def contexts(self) -> int:
        """How many contexts a step has: with guidance, the negative prompt too."""
        return 1 if self.guidance in (None, 1) else 2

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt is used."""
        return self.contexts > 1 or self.nag is not None

    @property
    def passes(self) -> int:
        """How many times the transformer runs for the longest window, with each of its contexts."""
        if not self.ar_step:
            return self.steps
        lag = min(self.ar_step, self.steps)
        return self.steps + lag * (max(window.latents for window in self.windows()) // BLOCK - 1)

    @property
    def latent_frames(self) -> int:
        """Latent frames of the clip, without references."""
        return latents(self.frame_count)

    def windows(self, speech_frames: int = 0) -> tuple[Window, ...]:
        """The windows of the clip, in order. speech_frames: how many frames the speech of a talking avatar takes."""
        length = Length(
            frames=self.frame_count,
            seconds=int(self.length),
            images=max(1, len(self.images)),
            condition_frames=self.condition_frames or 1,
            latent_rate=self.latent_rate,
            window_frames=self.window_frames,
            speech_frames=speech_frames,
        )
        return self.spec.windows(length)

    def of(self, spec: TaskSpec) -> "Request":
        """The request with the values of a model for all that it leaves open."""
        return replace(self, variant=spec.model or None)

    def usual(self) -> dict[str, Any]:
        """The values that the request's model gives to such a clip, where it leaves them open."""
        size = self.size if isinstance(self.size, tuple) else None
        bare = Request(
            self.task, self.prompt, variant=self.variant, size=size, frames=self.frames, seconds=self.seconds
        )
        return {name: getattr(bare, name) for name in _BY_MODEL}

    def for_task(self, task: str) -> dict[str, Any]:
        """The values that mean the same for another task: of its model, and of a clip's length, none does.

        A size is one of them if the other task has it, a video if it goes on from one.
        """
        there, values = TASKS[task], {name: getattr(self, name) for name in SHARED} | {"task": task}
        if (tag := self.spec.transitions.get(self.transition or "")) is not None:
            values["prompt"] = self.prompt.removeprefix(tag).lstrip()
        if isinstance(self.size, tuple):
            sizes = [there.size(resolution, *self.size) for resolution in there.resolutions]
            values |= {"size": self.size} if self.size in sizes else {}
        if self.spec.video and there.video:
            values |= {"video": self.video, "join": self.join}
        return values

    def type_problems(self) -> list[str]:
        """Values of a wrong type; no other check can be made on them."""
        values = [(name, getattr(self, name), kind) for name, kind in _KINDS.items()]
        values = [(name, value, kind) for name, value, kind in values if value is not None or name in _REQUIRED]
        images: Any = self.images
        values += [("image", image, _PATH) for image in (images if isinstance(images, (list, tuple)) else (images,))]
        if not isinstance(self.loras, (list, tuple)):
            return [f"loras is {reprlib.repr(self.loras)}, expected a list of files"]
        if problems := [problem for lora in self.loras if (problem := lora_problem(lora))]:
            return problems
        values += [("lora", as_lora(lora).path, _PATH) for lora in self.loras]
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
        images, loras = (path.absolute() for path in self.images), (lora.absolute() for lora in self.loras)
        return replace(self, images=tuple(images), loras=tuple(loras), **whole)

    def as_json(self) -> dict[str, Any]:
        """The values that are set, as plain values."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if (
                value is None
                or value is False
                or (field.name == "loras" and not value)
                or field.name == "overwrite"
                or (field.name == "devices" and value == 1)
                or (field.name == "resolution" and self.size)
            ):
                continue
            if field.name in _OPTIONS and (field.name not in self.spec.options or value == field.default):
                continue
            if isinstance(value, Path):
                value = str(value)
            elif isinstance(value, tuple):
                value = [str(item) if isinstance(item, (Path, Lora)) else item for item in value]
            values[field.name] = value
        return values


def is_text(value: str) -> bool:
    """Whether a str can be written down: none of its characters is half of a pair, or a byte that was no UTF-8."""
    return re.search("[\ud800-\udfff]", value) is None


def _type_problem(name: str, value: Any, kind: tuple[type, ...]) -> str:
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        return f"{name} is a number of more than 19 digits"
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not _FLAG):
        return f"{name} is {reprlib.repr(value)}, expected {_EXPECTED[kind]}"
    if isinstance(value, (str, Path)) and "\0" in str(value):
        return f"{name} has a NUL character in it"
    if kind is _TEXT and not is_text(str(value)):
        return f"{name} is {reprlib.repr(value)}, which is not text in UTF-8"
    if kind is _PATH and not is_possible(Path(str(value))):
        return f"{name} is {reprlib.repr(str(value))}, which no file can be called"
    return ""


def _parse_size(text: str) -> tuple[int, int] | str:
    """ "480x832" -> (480, 832), height first. Text that is not a size is returned unchanged, for the error message."""
    match = re.fullmatch(r"(\d{1,6})\s*[xX×*]\s*(\d{1,6})", text.strip())
    return (int(match[1]), int(match[2])) if match else text
