"""What a user asks for. Checked as a whole: every problem is found before the first is reported."""

import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.sizes import GRID, RESOLUTIONS

TASKS = ("r2v",)
FPS = 24
MAX_REFERENCES = 4
TEXT_LENGTH = 512  # tokens of a prompt that the models read
_MAX_SEED = (1 << 63) - 1
_MAX_LATENT_FRAMES = 1024 - MAX_REFERENCES  # positions that the models have on the time axis
_SECONDS = 5.0  # of a clip whose length is not said
_MAX_SECONDS = (_MAX_LATENT_FRAMES - 1) * 4 // FPS
DEVICES = ("cuda", "cpu")
DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("exact", "fast")


@dataclass(frozen=True)
class Request:
    """A clip to make.

    images: one to four reference pictures. output: the mp4; None keeps the frames in memory only. model: a folder of
    converted files, or one of them. quant: which transformer, where the folder has several. size: (height, width) in
    pixels, or "HxW"; without it `resolution` picks one that suits the first picture. frames: 4 k + 1; or
    `seconds`, at 24 frames each and one; five seconds if neither is given. seed: None draws one.
    precision: "exact" or "fast" (int8); None leaves it to the plan. max_vram, max_ram: limits in GiB.
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
    steps: int = 8
    seed: int | None = None
    device: str | None = None
    dtype: str | None = None
    precision: str | None = None
    max_vram: float | None = None
    max_ram: float | None = None
    save_latents: Path | None = None

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
        for name in ("output", "model", "save_latents"):
            if getattr(self, name) is not None:
                put(name, Path(getattr(self, name)))
        if isinstance(self.size, str):
            put("size", _parse_size(self.size))
        put("resolution", self.resolution.upper())
        if self.quant is not None:
            put("quant", self.quant.upper())

    @property
    def frame_count(self) -> int:
        """Frames of the clip."""
        if self.frames is not None:
            return self.frames
        return round((_SECONDS if self.seconds is None else self.seconds) * FPS) // 4 * 4 + 1

    @property
    def latent_frames(self) -> int:
        """Latent frames of the clip, without references."""
        return 1 + (self.frame_count - 1) // 4

    def absolute(self) -> "Request":
        """The same request, with paths that hold in every folder."""
        places = {name: getattr(self, name) for name in ("output", "model", "save_latents")}
        whole = {name: path.absolute() for name, path in places.items() if path is not None}
        return replace(self, images=tuple(path.absolute() for path in self.images), **whole)

    def as_json(self) -> dict[str, Any]:
        """Plain values, those that are set."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or (field.name == "resolution" and self.size):
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
            **dict.fromkeys(("frames", "seed"), whole),
            **dict.fromkeys(("seconds", "max_vram", "max_ram"), number),
            **dict.fromkeys(("quant", "device", "dtype", "precision"), text),
            **dict.fromkeys(("output", "model", "save_latents"), path),
        }
        values = [(name, getattr(self, name), kind) for name, kind in kinds.items() if getattr(self, name) is not None]
        values += [("steps", self.steps, whole), ("prompt", self.prompt, text), ("resolution", self.resolution, text)]
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
        problems = []
        if self.task not in TASKS:
            problems.append(f"unknown task {self.task!r}, expected {' or '.join(TASKS)}")
        if not self.prompt.strip():
            problems.append("the prompt is empty: say with -p what the clip shows")
        if not 1 <= len(self.images) <= MAX_REFERENCES:
            problems.append(f"got {len(self.images)} reference images, expected 1 to {MAX_REFERENCES}")
        for image in self.images:
            if not image.is_file():
                problems.append(f"{image} is a folder" if image.is_dir() else f"{image} does not exist")
        return problems

    def _shape_problems(self) -> list[str]:
        problems = []
        if isinstance(self.size, str):
            problems.append(f"size {self.size!r} is not HxW, height and width in pixels, such as 480x832")
        elif self.size is not None and not (min(self.size) >= GRID and all(side % GRID == 0 for side in self.size)):
            near = "x".join(str(max(GRID, round(side / GRID) * GRID)) for side in self.size)
            height, width = self.size
            problems.append(f"size {height}x{width} is not on the grid of {GRID} pixels; the nearest is {near}")
        if self.size is None and self.resolution not in RESOLUTIONS:
            problems.append(f"unknown resolution {self.resolution!r}, expected {', '.join(RESOLUTIONS)}")
        if self.frames is not None and (self.frames < 1 or self.frames % 4 != 1):
            nearest = max(0, round((self.frames - 1) / 4)) * 4 + 1
            problems.append(f"{self.frames} frames are not 4 k + 1; the nearest is {nearest}")
        elif self.frames is not None and self.seconds is not None:
            problems.append(f"got {self.frames} frames and {self.seconds:g} seconds, expected one of them")
        elif self.seconds is not None and not 0 < self.seconds <= _MAX_SECONDS:
            problems.append(f"got {self.seconds:g} seconds, expected more than 0 and at most {_MAX_SECONDS}")
        elif self.latent_frames > _MAX_LATENT_FRAMES:
            most = (_MAX_LATENT_FRAMES - 1) * 4 + 1
            problems.append(f"{self.frame_count} frames are too many, the model has positions for {most}")
        return problems

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
        inputs = {image.resolve() for image in self.images}
        return problems + [
            f"{path} is one of the pictures, it would be lost" for path in places if path.resolve() in inputs
        ]


def _parse_size(text: str) -> tuple[int, int] | str:
    """ "480x832" -> (480, 832), height first; what is no size stays as it is, for the error to show."""
    match = re.fullmatch(r"(\d{1,6})\s*[xX×*]\s*(\d{1,6})", text.strip())
    return (int(match[1]), int(match[2])) if match else text


def place_problems(path: Path) -> list[str]:
    """Why a file cannot be written there; better known before the work than after it."""
    if path.is_dir():
        return [f"{path} is a folder, expected the name of a file"]
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return [f"{path} cannot be written: {folder} is a file"]
    return [] if os.access(folder, os.W_OK) else [f"{path} cannot be written: {folder} is read-only"]
