"""What a user asks for. Checked as a whole: every problem is found before the first is reported."""

import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.kernels.disk import existing_folder
from skyrun.tasks.sizes import GRID
from skyrun.tasks.skyreels_v3 import (
    MAX_LATENT_FRAMES,
    TASKS,
    TRANSITIONS,
    WINDOW_FRAMES,
    Task,
    frames_of,
    usual_condition_frames,
)

TEXT_LENGTH = 512  # tokens of a prompt that the models read
_MAX_SEED = (1 << 63) - 1
_SECONDS = 5.0  # of a clip whose length is not said
_MOST_FRAMES = (MAX_LATENT_FRAMES - 1) * 4 + 1
_TAG = re.compile(r"\s*(\[[A-Z_ -]+\])")
DEVICES = ("cuda", "cpu")
DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("exact", "fast")


_PLACES = ("video", "audio", "output", "model", "save_latents")
_OPTIONS = frozenset().union(*(task.options for task in TASKS.values()))


@dataclass(frozen=True)
class Request:
    """A clip to make.

    task: "r2v" shows what is in one to four `images`, "v2v" is how a `video` goes on, "shot" its next shot, "a2v" lets
    a portrait say what is in `audio`. output: the mp4; None keeps the frames in memory only. model: a folder of
    converted files, or one of them. quant: which transformer, where the folder has several. size: (height, width) in
    pixels, or "HxW"; without it `resolution` picks one that suits the first picture. frames: 4 k + 1; or `seconds`, at
    24 frames each and one; five seconds if neither is given. Of speech `seconds` takes the beginning. seed: None draws
    one. precision: "exact" or "fast" (int8); None leaves it to the plan. max_vram, max_ram: limits in GiB.

    transition: a name of tasks.TRANSITIONS, in place of its tag in the prompt. join: the clip begins with the video.
    How windows are cut, which only tests change: condition_frames of the video are seen, latent_rate latent frames are
    made for a second, window_frames for a stretch of speech.
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
    steps: int = None  # type: ignore[assignment]  # as many as the task's model was distilled for
    seed: int | None = None
    device: str | None = None
    dtype: str | None = None
    precision: str | None = None
    max_vram: float | None = None
    max_ram: float | None = None
    save_latents: Path | None = None
    video: Path | None = None
    audio: Path | None = None
    transition: str | None = None
    join: bool = False
    overwrite: bool = False  # files of these names
    condition_frames: int = None  # type: ignore[assignment]  # as upstream
    latent_rate: int = 6
    window_frames: int = WINDOW_FRAMES

    def __post_init__(self) -> None:
        problems = self._type_problems()
        if not problems:  # values of the wrong type cannot be compared
            self._normalise()
            problems = [*self._task_problems(), *self._shape_problems(), *self._choice_problems()]
            problems += self._place_problems()
        if problems:
            raise SkyrunError.listing("this cannot be run", problems, "see `skyrun run --help`")

    def _normalise(self) -> None:
        """Give every value the one form that the rest of the code expects."""

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        images = (self.images,) if isinstance(self.images, (str, Path)) else self.images
        put("images", tuple(Path(image) for image in images))
        for name in _PLACES:
            if getattr(self, name) is not None:
                put(name, Path(getattr(self, name)))
        if isinstance(self.size, str):
            put("size", _parse_size(self.size))
        put("resolution", self.resolution.upper())
        if self.quant is not None:
            put("quant", self.quant.upper())
        if self.task in TASKS:
            put("steps", TASKS[self.task].steps if self.steps is None else self.steps)
            if self.condition_frames is None:
                counts = self.task == "shot" and not self._length_problems(TASKS[self.task])
                put("condition_frames", usual_condition_frames(self.task, self.frame_count if counts else 1))
        if self.transition in TRANSITIONS:
            tag = TRANSITIONS[self.transition]
            put("prompt", self.prompt if self.prompt.startswith(tag) else f"{tag} {self.prompt.lstrip()}")

    @property
    def frame_count(self) -> int:
        """Frames of the clip."""
        if self.frames is not None:
            return self.frames
        return frames_of(_SECONDS if self.seconds is None else self.seconds)

    @property
    def whole_seconds(self) -> int:
        """Length of an extension."""
        return int(_SECONDS if self.seconds is None else self.seconds)

    @property
    def latent_frames(self) -> int:
        """Latent frames of the clip, without references."""
        return 1 + (self.frame_count - 1) // 4

    def absolute(self) -> "Request":
        """The same request, with paths that hold in every folder."""
        places = {name: getattr(self, name) for name in _PLACES}
        whole = {name: path.absolute() for name, path in places.items() if path is not None}
        return replace(self, images=tuple(path.absolute() for path in self.images), **whole)

    def as_json(self) -> dict[str, Any]:
        """Plain values, those that are set."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "overwrite" or (field.name == "resolution" and self.size):
                continue
            if field.name in _OPTIONS and (field.name not in TASKS[self.task].options or value == field.default):
                continue
            if isinstance(value, Path):
                value = str(value)
            elif isinstance(value, tuple):
                value = [str(item) if isinstance(item, Path) else item for item in value]
            values[field.name] = value
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Request":
        """The request whose `as_json` these values are. SkyrunError if they are something else."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not {"task", "prompt"} <= set(values) <= known:
            raise SkyrunError(
                "these values are not a request", f"expected task, prompt, and of {', '.join(sorted(known))}"
            )
        listed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**listed)

    def _type_problems(self) -> list[str]:
        """What a caller from Python can get wrong that the command line cannot."""
        whole: tuple[type, ...] = (int,)
        number: tuple[type, ...] = (int, float)
        text: tuple[type, ...] = (str,)
        path: tuple[type, ...] = (str, Path)
        kinds: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("frames", "seed", "steps", "condition_frames", "latent_rate", "window_frames"), whole),
            **dict.fromkeys(("seconds", "max_vram", "max_ram"), number),
            **dict.fromkeys(("quant", "device", "dtype", "precision", "transition"), text),
            **dict.fromkeys(_PLACES, path),
        }
        values = [(name, getattr(self, name), kind) for name, kind in kinds.items() if getattr(self, name) is not None]
        values += [("prompt", self.prompt, text), ("resolution", self.resolution, text)]
        images = self.images if isinstance(self.images, (list, tuple)) else (self.images,)
        values += [("image", image, path) for image in images]
        size = self.size
        if size is not None and not isinstance(size, str):
            pair = tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else (size,)
            values += [("size", size if len(pair) == 1 else side, whole) for side in pair]
        expected: dict[tuple[type, ...], str] = {
            whole: "a whole number",
            number: "a number",
            text: "text",
            path: "a path",
        }
        return [
            f"{name} is {value!r}, expected {expected[kind]}"
            for name, value, kind in values
            if not isinstance(value, kind) or isinstance(value, bool)
        ]

    def _task_problems(self) -> list[str]:
        if self.task not in TASKS:
            return [f"unknown task {self.task!r}, expected {' or '.join(TASKS)}"]
        task, problems = TASKS[self.task], []
        if not self.prompt.strip():
            problems.append("the prompt is empty: say with -p what the clip shows")
        fewest, most = task.images
        if not fewest <= len(self.images) <= most:
            count = f"{fewest} to {most}" if fewest < most else str(most)
            what = "portraits" if task.audio else "reference images"
            problems.append(
                f"got {len(self.images)} {what}, expected {count}" if most else f"{self.task} takes no --image"
            )
        for name, file, wanted in (("video", self.video, task.video), ("audio", self.audio, task.audio)):
            if wanted is not (file is not None):
                problems.append(f"{self.task} takes {f'a --{name} file' if wanted else f'no --{name}'}")
        problems += self._transition_problems(task)
        files = [file for file in (*self.images, self.video, self.audio) if file is not None]
        missing = [file for file in files if not file.is_file()]
        return problems + [f"{file} is a folder" if file.is_dir() else f"{file} does not exist" for file in missing]

    def _transition_problems(self, task: Task) -> list[str]:
        if self.join and "join" not in task.options:
            return [f"{self.task} has no --join"]
        known = ", ".join(TRANSITIONS)
        if "transition" not in task.options:
            return [f"{self.task} has no --transition"] if self.transition is not None else []
        if self.transition is not None and self.transition not in TRANSITIONS:
            return [f"unknown transition {self.transition!r}, expected {known}"]
        tags = _TAG.match(self.prompt)
        if tags and tags[1] not in TRANSITIONS.values():
            return [f"unknown tag {tags[1]} in the prompt, expected {', '.join(TRANSITIONS.values())}"]
        return []

    def _shape_problems(self) -> list[str]:
        problems = []
        if isinstance(self.size, str):
            problems.append(f"size {self.size!r} is not HxW, height and width in pixels, such as 480x832")
        elif self.size is not None and not (min(self.size) >= GRID and all(side % GRID == 0 for side in self.size)):
            near = "x".join(str(max(GRID, round(side / GRID) * GRID)) for side in self.size)
            height, width = self.size
            problems.append(f"size {height}x{width} is not on the grid of {GRID} pixels; the nearest is {near}")
        if self.task not in TASKS:
            return problems
        task = TASKS[self.task]
        if self.size is None and self.resolution not in task.resolutions:
            problems.append(f"unknown resolution {self.resolution!r}, expected {', '.join(task.resolutions)}")
        for name, least in (("condition_frames", 1), ("window_frames", 21)):
            if (count := getattr(self, name)) < least or count % 4 != 1:
                problems.append(f"{name} = {count}, expected 4 k + 1 and at least {least}")
        return problems + self._length_problems(task)

    def _length_problems(self, task: Task) -> list[str]:
        shortest, longest = task.seconds
        if self.frames is not None and not task.frames:
            return [f"{self.task} has no --frames: use --seconds"]
        if self.frames is not None and self.seconds is not None:
            return [f"got {self.frames} frames and {self.seconds:g} seconds, expected one of them"]
        if self.frames is not None and (self.frames < 1 or self.frames % 4 != 1):
            nearest = max(0, round((self.frames - 1) / 4)) * 4 + 1
            return [f"{self.frames} frames are not 4 k + 1; the nearest is {nearest}"]
        if self.seconds is not None and not (self.seconds > 0 and shortest <= self.seconds <= longest):
            least = f"at least {shortest:g}" if shortest else "more than 0"
            return [f"got {self.seconds:g} seconds, expected {least} and at most {longest:g}"]
        if self.seconds is not None and task.whole and self.seconds != int(self.seconds):
            return [f"got {self.seconds:g} seconds, {self.task} makes clips of whole seconds"]
        if self.frames is not None and self.frame_count > _MOST_FRAMES:
            return [f"{self.frame_count} frames are too many, the model has positions for {_MOST_FRAMES}"]
        return []

    def _choice_problems(self) -> list[str]:
        problems = []
        if not 1 <= self.steps <= 1000:
            problems.append(f"got {self.steps} steps, expected 1 to 1000")
        if self.seed is not None and not 0 <= self.seed <= _MAX_SEED:
            problems.append(f"seed {self.seed} is not between 0 and {_MAX_SEED}")
        if self.device not in (None, *DEVICES):
            problems.append(f"unknown device {self.device!r}, expected {' or '.join(DEVICES)}")
        if self.dtype not in (None, *DTYPES):
            problems.append(f"unknown dtype {self.dtype!r}, expected {', '.join(DTYPES)}")
        if self.precision not in (None, *PRECISIONS):
            problems.append(f"unknown precision {self.precision!r}, expected {' or '.join(PRECISIONS)}")
        for name, limit in (("--max-vram", self.max_vram), ("--max-ram", self.max_ram)):
            if limit is not None and not 0 < limit < float("inf"):
                problems.append(f"{name} {limit:g} GiB is not a limit, expected a number above 0")
        if self.output is not None and self.output.suffix.lower() != ".mp4":
            problems.append(f"{self.output} does not end in .mp4")
        return problems

    def _place_problems(self) -> list[str]:
        places = [path for path in (self.output, self.save_latents) if path is not None]
        problems = [problem for path in places for problem in place_problems(path)]
        if len({path.resolve() for path in places}) < len(places):
            problems.append(f"the clip and the latents cannot both be {places[0]}")
        files = [file for file in (*self.images, self.video, self.audio) if file is not None]
        inputs = {file.resolve() for file in files}
        return problems + [
            f"{path} is what the clip is made from, it would be lost" for path in places if path.resolve() in inputs
        ]


def _parse_size(text: str) -> tuple[int, int] | str:
    """ "480x832" -> (480, 832), height first; what is no size stays as it is, for the error to show."""
    match = re.fullmatch(r"(\d{1,6})\s*[xX×*]\s*(\d{1,6})", text.strip())
    return (int(match[1]), int(match[2])) if match else text


def place_problems(path: Path) -> list[str]:
    """Why a file cannot be written there; better known before the work than after it."""
    if path.is_dir():
        return [f"{path} is a folder, expected the name of a file"]
    folder = existing_folder(path.parent)
    if not folder.is_dir():
        return [f"{path} cannot be written: {folder} is a file"]
    return [] if os.access(folder, os.W_OK) else [f"{path} cannot be written: {folder} is read-only"]
