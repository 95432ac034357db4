"""What a run says while it works. Pipelines yield these; whoever runs them shows, saves or ignores them."""

import re
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from skyrun.presets import Plan

T = TypeVar("T")
_START = time.perf_counter()


def now() -> float:
    """Seconds since the process began to count."""
    return time.perf_counter() - _START


@dataclass(frozen=True)
class StageStarted:
    """A stage begins. total: units of work, in `unit`. before: units of it that are done already.

    part: which window of a long clip it belongs to, from 1 on, and how many there are.
    """

    stage: str
    total: int
    unit: str
    before: int = 0
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Progress:
    """Units of the running stage that are done."""

    stage: str
    done: float


@dataclass(frozen=True)
class BlockDone:
    """A model finished a block. Times in seconds on one clock; reading a block overlaps computing those before it."""

    index: int
    total: int
    read_start: float
    read_end: float
    compute_start: float
    compute_end: float


@dataclass(frozen=True)
class StageEnded:
    """A stage is over. peak_bytes: highest device memory in it; on a CPU the memory of the process at its end."""

    stage: str
    seconds: float
    peak_bytes: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    stall_seconds: float = 0.0


@dataclass(frozen=True)
class Notice:
    """Something that a person should know; the run goes on."""

    text: str


@dataclass(frozen=True)
class Replanned(Notice):
    """Memory ran out. The run goes on from its last finished step by this plan."""

    plan: "Plan"


@dataclass(frozen=True)
class LatentsReady:
    """Denoising of a window is over. latents: float32 [C, F', h, w] on the CPU."""

    latents: "Tensor"
    window: int = 0


@dataclass(frozen=True)
class Preview:
    """A step is done. latents: x0 as far as the model knows it, [C, F', h, w] on the device.

    image: what the clip will look like, where the caller of the run asked for it.
    """

    latents: "Tensor"
    image: "Image | None" = None


@dataclass(frozen=True)
class Attended:
    """What self-attention has skipped in a step, and what that cost, where it may skip something.

    density: the share of tiles that were read, 1 in a first step, which is dense. error: the largest relative error of
    a head's output, as measured on a sample. dense_heads: how many of all `heads`, of all blocks, skip nothing.
    densities, errors: of each block.
    """

    density: float
    error: float
    dense_heads: int
    heads: int
    densities: tuple[float, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class WindowDone:
    """All frames of a window are handed out, and the run's state says so. index: from 0 on, of `total`."""

    index: int
    total: int


@dataclass(frozen=True)
class FramesReady:
    """Some frames are decoded. frames: uint8 [n, H, W, 3]."""

    frames: "np.ndarray[Any, np.dtype[np.uint8]]"


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until the clip is done, from the steps measured so far.

    step_seconds: of a step, as measured. planned_step_seconds: what the plan expected.
    """

    seconds: float
    step_seconds: float
    planned_step_seconds: float


@dataclass(frozen=True)
class Kept:
    """What is finished of a run that ended early. path: the file that holds it. command: goes on from there."""

    path: Path
    command: str


Event = (
    StageStarted
    | Progress
    | BlockDone
    | StageEnded
    | Notice
    | LatentsReady
    | FramesReady
    | Preview
    | Attended
    | WindowDone
    | TimeLeft
    | Kept
)
_WORD = re.compile(r"(?<!^)(?=[A-Z])")


def as_json(event: Event) -> dict[str, Any]:
    """The event as plain values, named as "stage_started"; arrays become their shape."""
    name = {"event": _WORD.sub("_", type(event).__name__).lower()}
    if isinstance(event, (LatentsReady, FramesReady, Preview)):
        field = fields(event)[0]
        return name | {field.name: list(getattr(event, field.name).shape)}
    return name | {key: str(value) if isinstance(value, Path) else value for key, value in asdict(event).items()}


def listen(events: Generator[Event, None, T], on: Callable[[Event], None]) -> T:
    """Run to the end, hand every event to `on`, and return the value.

    What `on` raises is raised inside the generator too, so that it can save what is finished.
    """
    while True:
        try:
            event = next(events)
        except StopIteration as stop:
            value: T = stop.value
            return value
        try:
            on(event)
        except BaseException as error:
            with suppress(BaseException):  # this one again, or what became of it
                events.throw(error)
            raise


def drain(events: Generator[Event, None, T]) -> T:
    """Run to the end without looking at the events, and return the value."""
    return listen(events, lambda event: None)
