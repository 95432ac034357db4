"""Plan what would run, on this machine or another, with or without a model. Inputs need not exist."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.kernels.files.recipes import RECIPES
from skyrun.planning.adapters import open_adapters, with_adapters
from skyrun.planning.densities import with_density
from skyrun.planning.hardware import this_machine
from skyrun.planning.problems import (
    check_attention,
    check_devices,
    choice_problems,
    guidance_problems,
    length_problems,
    of_some_model,
    shape_problems,
    too_long,
)
from skyrun.planning.published import part_bytes, published_shapes, published_workload, with_clip
from skyrun.planning.request import Request
from skyrun.presets import Hardware, Plan, Workload, choose
from skyrun.presets.assumptions import assumptions
from skyrun.presets.machine.cards import card_like, find_card, why_unknown
from skyrun.presets.machine.hardware import ASSUMED, STATED, free_ram, stated
from skyrun.presets.machine.named import preset
from skyrun.presets.memory import GIB, HEAD_DIM
from skyrun.presets.options import PREFERENCES
from skyrun.tasks.sizes import WIDE
from skyrun.tasks.windows import SPEECH_RATE, speech_frame_count

_RAM, _DISK = 16.0, 0.5  # GiB and GB/s that another machine is assumed to have


@dataclass(frozen=True)
class Planned:
    """A plan with the request, hardware and workload that it was made for. alone: that of one device, if it is for
    several."""

    request: Request
    hardware: Hardware
    workload: Workload
    plan: Plan
    alone: Plan | None = None

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the plan's times rest on, in sentences."""
        return tuple(assumptions(self.hardware, self.workload, self.plan))

    @property
    def transformer_bytes(self) -> int:
        """What the file of the transformer takes on a disk, but for its header."""
        return self.workload.layers * self.workload.block_bytes + self.workload.outer_bytes

    @property
    def model_bytes(self) -> dict[str, int]:
        """What the files of the model take on a disk, by role; the other parts are those that are published."""
        others = part_bytes(self.request.task, self.request.variant) if self.request.model is None else {}
        return {"transformer": self.transformer_bytes, **others}

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {"task": self.request.task, "size": [self.workload.height, self.workload.width]} | {
            "frames": self.workload.frames,
            "tokens": self.workload.tokens,
            "transformer_bytes": self.transformer_bytes,
            "model_bytes": self.model_bytes,
            "hardware": hardware_json(self.hardware),
            "assumptions": list(self.assumptions),
            "plan": self.plan.as_json(),
            **({"one_device": self.alone.as_json()} if self.alone is not None else {}),
        }


def hardware_json(hardware: Hardware) -> dict[str, Any]:
    """Every value of the hardware with its origin."""
    values = asdict(hardware)
    origins = values.pop("origins")
    return {name: {"value": value, "origin": origins.get(name, ASSUMED)} for name, value in values.items()}


def request_workload(request: Request, shape: tuple[int, int] = WIDE) -> Workload:
    """The workload of a request whose inputs need not exist, computed from its model or else the published one.

    Without a size the clip has that shape, about 16:9 by default. Raises SkyrunError for a length, resolution or type
    that does not exist.
    """
    if problems := of_some_model(request, lambda one: [*_problems(one)]):
        raise SkyrunError.listing("this cannot be planned", problems, "see `skyrun plan --help`")
    if request.model is None:
        request = request.of(request.spec)
        work = published_workload(request.task, request.quant, request.variant)
        if request.loras:
            work = with_adapters(work, open_adapters(request.loras, published_shapes(request.spec)))
    else:
        request, work = _with_model(request, shape)
    spec = request.spec
    size = request.size or spec.size(request.resolution, *shape)
    assert not isinstance(size, str)
    windows = request.windows(speech_frame_count(round(request.length * SPEECH_RATE)))
    return with_clip(work, request, size, windows)


def _with_model(request: Request, shape: tuple[int, int]) -> tuple[Request, Workload]:
    """The request with the values, a size and a length of its model, and the workload of that model."""
    from skyrun.models.folder import open_folder  # these load torch, which the published models do not need
    from skyrun.planning.model import choose_model
    from skyrun.planning.own_clips import read_own_clips
    from skyrun.planning.workload import model_workload

    model = choose_model(open_folder(request.model), request.spec, request.quant)
    request = request.of(model.spec)
    if (own := read_own_clips(model.files.transformer)) is not None:
        request = own.fitted(request, *shape)
    return request, model_workload(request.spec, model.adapted(request.loras))


def _problems(request: Request) -> Iterator[str]:
    spec = request.spec
    yield from shape_problems(request)
    yield from length_problems(spec, request.frames, request.seconds)
    yield from choice_problems(request)
    yield from guidance_problems(request, spec)
    if request.size is None and request.resolution is not None and request.resolution not in spec.resolutions:
        yield f"{spec.name} has no resolution {request.resolution!r}, it has {', '.join(spec.resolutions)}"
    if request.quant is not None and request.model is None and request.quant not in RECIPES:
        yield f"unknown type {request.quant!r}, known are {', '.join(RECIPES)}"


def described_hardware(
    gpu: str | None = None,
    like: str | None = None,
    vram: float | None = None,
    ram: float | None = None,
    disk: float | None = None,
    model: Path | None = None,
) -> Hardware:
    """The machine that options describe; without `gpu` this machine with the given values.

    SkyrunError for a card that is in no table.

    Args:
        gpu: The name of a card.
        like: In place of it, a card as quick as that one, with `vram`.
        vram: Its GiB.
        ram: GiB of the machine, in all.
        disk: GB/s of the disk that the model is on.
        model: A model whose disk is measured where `disk` is not given.
    """
    problems = [
        f"--{name} {value:g} is not a size, expected a number above 0"
        for name, value in (("vram", vram), ("ram", ram), ("disk", disk))
        if value is not None and not 0 < value < float("inf")
    ]
    if gpu is not None and like is not None:
        problems.append("--gpu and --like both name a card")
    if vram is not None and gpu is like is None:
        problems.append("--vram says nothing without --gpu or --like")
    if like is not None and vram is None:
        problems.append("--like needs --vram, the GiB of the card that is meant")
    name, card = like if gpu is None else gpu, None
    if name == "":
        problems.append("--gpu and --like take the name of a card; --gpu list lists them")
    elif name is not None:
        card = card_like(name, vram) if like is not None and vram is not None else find_card(name, vram)
        if card is None:
            problems.append(why_unknown(name))
    if problems:
        raise SkyrunError.listing("this machine cannot be planned for", problems, "see `skyrun plan --help`")
    found = stated(card, ram or _RAM, disk or _DISK, vram) if card else this_machine(model=model)
    if card is None and ram is not None:
        found = found.knowing(STATED, ram_total=int(ram * GIB), ram_free=free_ram(ram))
    if disk is not None:
        found = found.knowing(STATED, disk_rate=disk * 1e9)
    given = {"name": name, "vram_free": vram, "ram_free": ram}
    return replace(found, origins=found.origins | {name: STATED for name, value in given.items() if value is not None})


def plan_request(request: Request, hardware: Hardware, shape: tuple[int, int] = WIDE, **limits: Any) -> Planned:
    """The plan for a request whose inputs need not exist.

    shape: height and width of what the clip is made from. limits: further arguments of `presets.choose`.
    """
    workload = with_density(request_workload(request, shape), request.attention)
    check_devices(request, workload.dim // HEAD_DIM)
    check_attention(hardware, request.attention)
    asked = {"precision": request.precision, "attention": request.attention, "prefer": request.prefer or PREFERENCES[0]}
    plan = choose(hardware, workload, **asked | limits)
    chosen = next(work for work in workload.offers() if work.weight_type == plan.weight_type)
    advice = () if request.spec.video else too_long(chosen.windows, chosen.frames / request.spec.fps)
    alone = None
    if request.devices > 1:
        alone = choose(hardware, replace(workload, devices=1), **asked | limits)
    return Planned(request, hardware, chosen, replace(plan, notes=(*plan.notes, *advice)), alone)


def stated_hardware(preset_name: str | None, model: Path | None = None, **parts: Any) -> Hardware:
    """A machine by the name of a preset, or as `described_hardware` has it. SkyrunError if both are given."""
    if preset_name is None:
        return described_hardware(**parts, model=model)
    if any(part is not None for part in parts.values()):
        hint = "leave out --gpu, --like, --vram, --ram and --disk, or --preset"
        raise SkyrunError("--preset is a whole machine", hint)
    return preset(preset_name)
