"""Plan what would run, on this machine or another, with or without a model. Inputs need not exist."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.kernels.recipes import RECIPES
from skyrun.planning.hardware import this_machine
from skyrun.planning.problems import length_problems
from skyrun.planning.published import published_workload, with_clip
from skyrun.planning.request import SECONDS, Request
from skyrun.presets import Hardware, Plan, Workload, choose
from skyrun.presets.cards import find_card, why_unknown
from skyrun.presets.hardware import ASSUMED, STATED, free_ram, stated
from skyrun.presets.memory import GIB
from skyrun.presets.named import preset
from skyrun.tasks.windows import SPEECH_RATE, speech_frame_count

_WIDE = (9, 16)  # height and width that an image which does not exist is assumed to have
_RAM, _DISK = 16.0, 0.5  # GiB and GB/s that another machine is assumed to have


@dataclass(frozen=True)
class Planned:
    """A plan with the request, hardware and workload that it was made for."""

    request: Request
    hardware: Hardware
    workload: Workload
    plan: Plan

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {"task": self.request.task, "size": [self.workload.height, self.workload.width]} | {
            "frames": self.workload.frames,
            "tokens": self.workload.tokens,
            "hardware": hardware_json(self.hardware),
            "plan": self.plan.as_json(),
        }


def hardware_json(hardware: Hardware) -> dict[str, Any]:
    """Every value of the hardware with its origin."""
    values = asdict(hardware)
    origins = values.pop("origins")
    return {name: {"value": value, "origin": origins.get(name, ASSUMED)} for name, value in values.items()}


def request_workload(request: Request) -> Workload:
    """The workload of a request whose inputs need not exist, computed from its model or else the published one.

    Without a size the clip is about 16:9. Raises SkyrunError for a length, resolution or type that does not exist.
    """
    if problems := [*_problems(request)]:
        raise SkyrunError.listing("this cannot be planned", problems, "see `skyrun plan --help`")
    spec = request.spec
    size = request.size or spec.size(request.resolution, *_WIDE)
    assert not isinstance(size, str)
    seconds = SECONDS if request.seconds is None else request.seconds
    windows = request.windows(speech_frame_count(round(seconds * SPEECH_RATE)))
    work = published_workload(spec.name, request.quant) if request.model is None else _model_workload(request)
    return with_clip(work, spec, size, request.steps, windows)


def _model_workload(request: Request) -> Workload:
    from skyrun.models.folder import open_folder  # these load torch, which the published models do not need
    from skyrun.planning.model import choose_model
    from skyrun.planning.workload import model_workload

    return model_workload(request.spec, choose_model(open_folder(request.model), request.spec, request.quant))


def _problems(request: Request) -> Iterator[str]:
    spec = request.spec
    yield from length_problems(spec, request.frames, request.seconds)
    if request.size is None and request.resolution not in spec.resolutions:
        yield f"{spec.name} has no resolution {request.resolution!r}, it has {', '.join(spec.resolutions)}"
    if request.quant is not None and request.model is None and request.quant not in RECIPES:
        yield f"unknown type {request.quant!r}, known are {', '.join(RECIPES)}"


def described_hardware(
    gpu: str | None, vram: float | None, ram: float | None, disk: float | None, model: Path | None = None
) -> Hardware:
    """The machine that options describe; without `gpu` this machine with the given values.

    Args:
        gpu: name of a graphics card; the machine is then another one.
        vram: GiB of VRAM that the card has.
        ram: GiB of RAM.
        disk: GB/s that the disk delivers.
        model: a file on the disk that models are read from.

    Raises SkyrunError for a card that is not in the table and for values that are not sizes.
    """
    problems = [
        f"--{name} {value:g} is not a size, expected a number above 0"
        for name, value in (("vram", vram), ("ram", ram), ("disk", disk))
        if value is not None and not 0 < value < float("inf")
    ]
    if vram is not None and gpu is None:
        problems.append("--vram says nothing without --gpu")
    card = find_card(gpu, vram) if gpu is not None else None
    if gpu is not None and card is None:
        problems.append(why_unknown(gpu))
    if problems:
        raise SkyrunError.listing("this machine cannot be planned for", problems, "see `skyrun plan --help`")
    found = stated(card, ram or _RAM, disk or _DISK, vram) if card else this_machine(model=model)
    if card is None and ram is not None:
        found = found.knowing(STATED, ram_total=int(ram * GIB), ram_free=free_ram(ram))
    if disk is not None:
        found = found.knowing(STATED, disk_rate=disk * 1e9)
    given = {"name": gpu, "vram_free": vram, "ram_free": ram}
    return replace(found, origins=found.origins | {name: STATED for name, value in given.items() if value is not None})


def plan_request(request: Request, hardware: Hardware, **limits: Any) -> Planned:
    """The plan for a request whose inputs need not exist. limits: further arguments of `presets.choose`."""
    workload = request_workload(request)
    plan = choose(hardware, workload, prefer=request.prefer or "quality", **limits)
    chosen = next(work for work in workload.offers() if work.weight_type == plan.weight_type)
    return Planned(request, hardware, chosen, plan)


def stated_hardware(
    preset_name: str | None,
    gpu: str | None,
    vram: float | None,
    ram: float | None,
    disk: float | None,
    model: Path | None = None,
) -> Hardware:
    """The machine of a preset, or the one that `described_hardware` returns for the other options.

    Raises SkyrunError if both a preset and other options are given.
    """
    if preset_name is None:
        return described_hardware(gpu, vram, ram, disk, model)
    if any(part is not None for part in (gpu, vram, ram, disk)):
        raise SkyrunError("--preset is a whole machine", "leave out --gpu, --vram, --ram and --disk, or --preset")
    return preset(preset_name)
