"""`skyrun plan`: what would run, on this machine or on another, with a model or without."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.kernels.formats import FORMATS
from skyrun.machine import this_machine
from skyrun.presets import Hardware, Plan, Workload, choose
from skyrun.presets.cards import CARDS, find_card
from skyrun.presets.hardware import stated, stated_cpu
from skyrun.published import STEPS, published_workload
from skyrun.sizes import bucket

_WIDE = (9, 16)  # the shape of a picture that is not there


@dataclass(frozen=True)
class Clip:
    """A clip to plan for."""

    task: str
    resolution: str = "480P"
    seconds: float = 5.0
    quant: str | None = None


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
    from dataclasses import asdict

    values = asdict(hardware)
    origins = values.pop("origins")
    return {name: {"value": value, "origin": origins.get(name, "assumed")} for name, value in values.items()}


def clip_workload(clip: Clip) -> Workload:
    """The numbers of a clip by the published model of its task, wide as most screens."""
    if clip.quant is not None and clip.quant.upper() not in FORMATS:
        raise SkyrunError(f"unknown type {clip.quant!r}", f"known types: {', '.join(FORMATS)}")
    height, width = bucket(clip.resolution.upper(), *_WIDE)
    numbers = clip_numbers(clip.task, clip.seconds)
    type = clip.quant.upper() if clip.quant else None
    return published_workload(clip.task, type, height=height, width=width, steps=STEPS[clip.task], **numbers)


def clip_numbers(task: str, seconds: float) -> dict[str, int]:
    """Frames and windows of a clip."""
    if task == "r2v":
        frames = round(seconds * 24) // 4 * 4 + 1
        return {"frames": frames, "latent_frames": 1 + (frames - 1) // 4 + 4}
    if task == "shot":
        frames, before = int(seconds) * 24 + 1, min(33, max(9, 8 * int(seconds) - 7))
        latents = 1 + (frames - 1) // 4 + 1 + (before - 1) // 4
        return {"frames": frames, "latent_frames": latents, "encoded_frames": before}
    if task == "v2v":
        windows = -(-int(seconds) // 5)
        decoded = windows * 157
        numbers = {"frames": int(seconds) * 24, "latent_frames": 40, "windows": windows}
        return numbers | {"encoded_frames": 25 * windows, "decoded_frames": decoded}
    frames = round(seconds * 25)
    windows = 1 if frames < 81 else 2 + max(0, -(-(frames - 81) // 64))
    numbers = {"frames": frames, "latent_frames": 21, "windows": windows}
    return numbers | {"encoded_frames": 81 * windows, "decoded_frames": 81 * windows}


def stated_hardware(gpu: str | None, vram: float | None, ram: float | None, disk: float | None) -> Hardware:
    """The machine that options describe. SkyrunError for a card that is in no table."""
    ram, disk = ram or 16.0, disk or 0.5
    if gpu is None:
        return stated_cpu(ram, disk)
    card = find_card(gpu, vram)
    if card is None:
        known = ", ".join(dict.fromkeys(card.name for card in CARDS))
        raise SkyrunError(f"{gpu!r} is no card that skyrun knows", f"cards: {known}")
    return stated(card, ram, disk, vram)


def plan_clip(clip: Clip, hardware: Hardware, prefer: str = "quality", **limits: Any) -> Planned:
    """The plan for a clip by the published model."""
    workload = clip_workload(clip)
    plan = choose(hardware, workload, prefer=prefer, **limits)
    chosen = next(work for work in workload.offers() if work.weight_type == plan.weight_type)
    return Planned(clip, hardware, chosen, plan)


def plan_from(arguments: Namespace) -> Planned:
    """What the command line asks for."""
    clip = Clip(arguments.task, arguments.resolution, arguments.seconds, arguments.quant)
    other = any(value is not None for value in (arguments.gpu, arguments.vram, arguments.ram, arguments.disk))
    if other:
        hardware = stated_hardware(arguments.gpu, arguments.vram, arguments.ram, arguments.disk)
    else:
        hardware = this_machine(model=arguments.model)
    return plan_clip(clip, hardware, arguments.prefer)
