"""`skyrun plan`: what would run, on this machine or on another, with a model or without."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.kernels.formats import FORMATS
from skyrun.planning.hardware import this_machine
from skyrun.planning.published import published_workload
from skyrun.planning.workload import with_model
from skyrun.presets import Hardware, Plan, Workload, choose
from skyrun.presets.cards import CARDS, find_card
from skyrun.presets.hardware import ASSUMED, STATED, free_ram, stated
from skyrun.presets.memory import GIB
from skyrun.presets.named import preset
from skyrun.tasks.sizes import bucket
from skyrun.tasks.skyreels_v3 import TASKS, WINDOW_FRAMES, frames_of, usual_condition_frames
from skyrun.tasks.windows import RATE, amounts, extension_windows, frame_count, single_window, speech_windows

_WIDE = (9, 16)  # the shape of a picture that is not there
_RAM, _DISK = 16.0, 0.5  # GiB and GB/s of a machine of which nothing is said


@dataclass(frozen=True)
class Clip:
    """A clip to plan for. model: its files, None: the published ones, which need not be there."""

    task: str
    resolution: str = "480P"
    seconds: float = 5.0
    quant: str | None = None
    model: Path | None = None


@dataclass(frozen=True)
class Planned:
    """A plan, with what it is for."""

    clip: Clip
    hardware: Hardware
    workload: Workload
    plan: Plan

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"task": self.clip.task, "size": [self.workload.height, self.workload.width]} | {
            "frames": self.workload.frames,
            "tokens": self.workload.tokens,
            "hardware": hardware_json(self.hardware),
            "plan": self.plan.as_json(),
        }


def hardware_json(hardware: Hardware) -> dict[str, Any]:
    """Every number with where it comes from."""
    values = asdict(hardware)
    origins = values.pop("origins")
    return {name: {"value": value, "origin": origins.get(name, ASSUMED)} for name, value in values.items()}


def clip_workload(clip: Clip) -> Workload:
    """The numbers of a clip by the published model of its task, or by the clip's files; wide as most screens.

    SkyrunError for what no model makes.
    """
    if problems := [*_problems(clip)]:
        raise SkyrunError.listing("this cannot be planned", problems, "see `skyrun plan --help`")
    height, width = bucket(clip.resolution.upper(), *_WIDE, portrait=clip.task == "a2v")
    numbers = clip_numbers(clip.task, clip.seconds)
    type = clip.quant.upper() if clip.quant else None
    if clip.model is None:
        return published_workload(clip.task, type, height=height, width=width, steps=TASKS[clip.task].steps, **numbers)
    work = published_workload(clip.task, None, height=height, width=width, steps=TASKS[clip.task].steps, **numbers)
    return with_model(work, clip.model, type)


def _problems(clip: Clip) -> Iterator[str]:
    task = TASKS[clip.task]
    shortest, longest = task.seconds
    if not (clip.seconds > 0 and shortest <= clip.seconds <= longest):
        yield f"got {clip.seconds:g} seconds, {clip.task} makes {shortest:g} to {longest:g}"
    elif task.whole and clip.seconds != int(clip.seconds):
        yield f"got {clip.seconds:g} seconds, {clip.task} makes whole seconds"
    if clip.resolution.upper() not in task.resolutions:
        yield f"{clip.task} has no resolution {clip.resolution!r}, it has {', '.join(task.resolutions)}"
    if clip.quant is not None and clip.model is None and clip.quant.upper() not in FORMATS:
        yield f"unknown type {clip.quant!r}, known are {', '.join(FORMATS)}"


def clip_numbers(task: str, seconds: float) -> dict[str, int]:
    """Frames and windows of a clip, from one picture where it takes pictures."""
    frames = frames_of(seconds)
    condition_frames = usual_condition_frames(task, frames)
    match task:
        case "v2v":
            windows = extension_windows(int(seconds), 6, condition_frames)
        case "a2v":
            windows = speech_windows(frame_count(round(seconds * RATE)), WINDOW_FRAMES)
        case _:
            windows = (single_window(task, frames, condition_frames),)
    return amounts(task, windows, condition_frames)


def described_hardware(
    gpu: str | None, vram: float | None, ram: float | None, disk: float | None, model: Path | None = None
) -> Hardware:
    """The machine that options describe; without a card it is this one, with other numbers where they are given.

    SkyrunError for a card that is in no table.
    """
    problems = [
        f"--{name} {value:g} is no size, expected a number above 0"
        for name, value in (("vram", vram), ("ram", ram), ("disk", disk))
        if value is not None and not 0 < value < float("inf")
    ]
    if vram is not None and gpu is None:
        problems.append("--vram says nothing without --gpu")
    card = find_card(gpu, vram) if gpu is not None else None
    if gpu is not None and card is None:
        names = list(dict.fromkeys(card.name for card in CARDS))
        near = get_close_matches(gpu.upper(), names, 3, 0.5) or ["RTX 3060", "RTX 4070 Ti SUPER"]
        problems.append(f"{gpu!r} is no card that skyrun knows, such as {', '.join(near)}")
    if problems:
        raise SkyrunError.listing("this machine cannot be planned for", problems, "see `skyrun plan --help`")
    found = stated(card, ram or _RAM, disk or _DISK, vram) if card else this_machine(model=model)
    if card is None and ram is not None:
        found = found.knowing(STATED, ram_total=int(ram * GIB), ram_free=free_ram(ram))
    if disk is not None:
        found = found.knowing(STATED, disk_rate=disk * 1e9)
    given = {"name": gpu, "vram_free": vram, "ram_free": ram}
    return replace(found, origins=found.origins | {name: STATED for name, value in given.items() if value is not None})


def plan_clip(clip: Clip, hardware: Hardware, prefer: str = "quality", **limits: Any) -> Planned:
    """The plan for a clip by the published model."""
    workload = clip_workload(clip)
    plan = choose(hardware, workload, prefer=prefer, **limits)
    chosen = next(work for work in workload.offers() if work.weight_type == plan.weight_type)
    return Planned(clip, hardware, chosen, plan)


def plan_from(arguments: Namespace) -> Planned:
    """What the command line asks for."""
    resolution, seconds = arguments.resolution or "480P", arguments.seconds or 5.0
    clip = Clip(arguments.task, resolution, seconds, arguments.quant, arguments.model)
    parts = (arguments.gpu, arguments.vram, arguments.ram, arguments.disk)
    if arguments.preset and any(part is not None for part in parts):
        raise SkyrunError("--preset is a whole machine", "leave out --gpu, --vram, --ram and --disk, or --preset")
    hardware = preset(arguments.preset) if arguments.preset else described_hardware(*parts, arguments.model)
    return plan_clip(clip, hardware, arguments.prefer or "quality")
