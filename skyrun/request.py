"""What a user asks for. Checked as a whole: every problem is found before the first is reported."""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.sizes import GRID, RESOLUTIONS

TASKS = ("r2v",)
FPS = 24
MAX_REFERENCES = 4
_MAX_SEED = (1 << 63) - 1
_MAX_LATENT_FRAMES = 1024 - MAX_REFERENCES  # positions that the models have on the time axis
DEVICES = ("cuda", "cpu")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Request:
    """A clip to make.

    images: one to four reference pictures. output: the mp4; None keeps the frames in memory only. model: a folder of
    converted files, or one of them. quant: which transformer, where the folder has several. size: (height, width) in
    pixels; without it `resolution` picks one that suits the first picture. frames: 4 k + 1; without it `seconds` at
    24 frames each, and one. seed: None draws one. max_vram, max_ram: limits in GiB.
    """

    task: str
    prompt: str
    images: tuple[Path, ...] = ()
    output: Path | None = None
    model: Path | None = None
    quant: str | None = None
    size: tuple[int, int] | None = None
    resolution: str = "480P"
    frames: int | None = None
    seconds: float = 5.0
    steps: int = 8
    seed: int | None = None
    device: str | None = None
    dtype: str | None = None
    max_vram: float | None = None
    max_ram: float | None = None
    save_latents: Path | None = None

    def __post_init__(self) -> None:
        images = (self.images,) if isinstance(self.images, (str, Path)) else self.images
        object.__setattr__(self, "images", tuple(Path(image) for image in images))
        for name in ("output", "model", "save_latents"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        if isinstance(self.size, str):
            object.__setattr__(self, "size", parse_size(self.size))
        problems = [*self._task_problems(), *self._shape_problems(), *self._choice_problems()]
        if problems:
            raise SkyrunError.listing("this cannot be run", problems, "see `skyrun run --help`")

    @property
    def frame_count(self) -> int:
        """Frames of the clip."""
        return self.frames if self.frames is not None else round(self.seconds * FPS) // 4 * 4 + 1

    @property
    def latent_frames(self) -> int:
        """Latent frames of the clip, without references."""
        return 1 + (self.frame_count - 1) // 4

    def as_json(self) -> dict[str, Any]:
        """Plain values, those that are set."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            implied = (field.name == "resolution" and self.size) or (field.name == "seconds" and self.frames)
            if value is None or implied:
                continue
            if isinstance(value, Path):
                value = str(value)
            elif isinstance(value, tuple):
                value = [str(item) if isinstance(item, Path) else item for item in value]
            values[field.name] = value
        return values

    @classmethod
    def from_json(cls, text: str) -> "Request":
        """The request that `as_json` wrote."""
        values = json.loads(text)
        if "size" in values:
            values["size"] = tuple(values["size"])
        return cls(**values)

    def _task_problems(self) -> list[str]:
        problems = []
        if self.task not in TASKS:
            problems.append(f"unknown task {self.task!r}, expected {' or '.join(TASKS)}")
        if not self.prompt.strip():
            problems.append("the prompt is empty: say with -p what the clip shows")
        if not 1 <= len(self.images) <= MAX_REFERENCES:
            problems.append(f"got {len(self.images)} reference images, expected 1 to {MAX_REFERENCES}")
        problems += [f"{image} does not exist" for image in self.images if not image.is_file()]
        return problems

    def _shape_problems(self) -> list[str]:
        problems = []
        if self.size is not None and not (min(self.size) >= GRID and all(side % GRID == 0 for side in self.size)):
            near = "x".join(str(max(GRID, round(side / GRID) * GRID)) for side in self.size)
            height, width = self.size
            problems.append(f"size {height}x{width} is not on the grid of {GRID} pixels; the nearest is {near}")
        if self.size is None and self.resolution not in RESOLUTIONS:
            problems.append(f"unknown resolution {self.resolution!r}, expected {', '.join(RESOLUTIONS)}")
        if self.frames is not None and (self.frames < 1 or self.frames % 4 != 1):
            below = max(1, (self.frames - 1) // 4 * 4 + 1)
            problems.append(f"{self.frames} frames are not 4 k + 1; the nearest below is {below}")
        elif self.frames is None and not 0 < self.seconds < float("inf"):
            problems.append(f"got {self.seconds:g} seconds, expected more than 0")
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
        for name, limit in (("--max-vram", self.max_vram), ("--max-ram", self.max_ram)):
            if limit is not None and not limit > 0:
                problems.append(f"{name} {limit:g} GiB leaves no memory")
        if self.output is not None and self.output.suffix.lower() != ".mp4":
            problems.append(f"{self.output} does not end in .mp4")
        return problems


def parse_size(text: str) -> tuple[int, int]:
    """ "480x832" -> (480, 832), height first."""
    match = re.fullmatch(r"(\d+)[x*](\d+)", text.strip().lower())
    if not match:
        raise SkyrunError(f"size {text!r} is not HxW", "give height and width in pixels, such as --size 480x832")
    return int(match[1]), int(match[2])
