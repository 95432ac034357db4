"""Turn a request into a job: check and decide everything before any heavy work begins."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from skyrun.errors import WILL_NOT_FIT, SkyrunError
from skyrun.models.clip import CLIPVision
from skyrun.models.folder import ModelFiles, main_type, open_folder
from skyrun.models.umt5 import UMT5
from skyrun.planning.densities import with_density
from skyrun.planning.hardware import this_machine
from skyrun.planning.inputs import Inputs, clip_size, open_inputs
from skyrun.planning.model import Model, choose_model
from skyrun.planning.own_clips import read_own_clips
from skyrun.planning.problems import check, check_attention, check_devices, too_long, value_problems
from skyrun.planning.published import with_clip
from skyrun.planning.request import Request
from skyrun.planning.workload import model_workload
from skyrun.presets import Plan, Workload, choose
from skyrun.presets.options import PREFERENCES
from skyrun.streaming.device import choose_device, devices_here
from skyrun.tasks import TaskSpec
from skyrun.tasks.windows import Window, speech_frame_count

_SEEDS = 1 << 32
_OBLONG = 1.2  # the longer side by the shorter one, from which on a shape is wide or high


@dataclass(frozen=True)
class Job:
    """A request that has passed every check, with everything that was decided for it.

    frames: of the clip. passed_over: files of the model that do not fit, and why. scale: how many pixels high and wide
    the mp4 shows a pixel. guess: a sentence if it is not certain which model it is.
    """

    request: Request
    inputs: Inputs
    files: ModelFiles
    encoder: UMT5
    vision: CLIPVision | None
    height: int
    width: int
    frames: int
    windows: tuple[Window, ...]
    device: torch.device
    workload: Workload
    plan: Plan
    passed_over: tuple[str, ...] = ()
    scale: int = 1
    guess: str = ""

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know of the inputs, of the choice of files, and of the plan."""
        passed = tuple(f"passed over: {reason}" for reason in self.passed_over)
        passed += (self.guess,) if self.guess else ()
        seen = self.inputs.images or self.inputs.footage is not None
        advice = [*_turned(self.height, self.width, self.inputs.shape)] if seen else []
        if self.inputs.footage is None:  # windows that go on from a video have the length of training
            advice += too_long(len(self.windows), self.frames / self.fps)
        adapted = (notice for adapter in self.files.adapters for notice in adapter.notices)
        return (*self.inputs.notices, *passed, *adapted, *_unused(self.request), *advice, *self.plan.notes)

    @property
    def fps(self) -> int:
        """Frames per second of the clip."""
        return self.request.fps or self.request.spec.fps

    def part(self, index: int) -> tuple[int, int] | None:
        """(number, count) of a window, counted from 1, for messages; None if there is only one window."""
        return (index + 1, len(self.windows)) if len(self.windows) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """The decisions as plain values."""
        return {
            "request": self.request.as_json(),
            "size": [self.height, self.width],
            "frames": self.frames,
            "windows": len(self.windows),
            "tokens": self.workload.tokens,
            "model": {
                "type": main_type(self.files.transformer),
                **{name.replace(" ", "_"): str(path) for name, path in self.files.parts.items()},
            },
            "plan": self.plan.as_json(),
            "notices": list(self.notices),
        }


def prepare(request: Request) -> Job:
    """Read headers, images, video and speech, and decide sizes and the plan. No weights are read.

    Raises SkyrunError if anything is wrong with the input; the code is 4 if the model is missing, 3 if it won't fit.
    """
    check(request)
    if request.seed is None:
        request = replace(request, seed=random.SystemRandom().randrange(_SEEDS))
    device = choose_device(request.device, request.devices)
    inputs, model = _open(request)
    request, spec = _of_model(request, model.spec), model.spec
    own = read_own_clips(model.files.transformer)
    if own is not None:
        request = own.fitted(request, *inputs.shape)
    size = clip_size(request, *inputs.shape)
    request = replace(request, size=size)
    if spec.takes_frames:
        request = replace(request, frames=request.frame_count, seconds=None)
    windows = request.windows(speech_frame_count(len(inputs.speech)) if inputs.speech is not None else 0)
    _check_outputs(request, model.files)
    check_devices(request, model.dims.heads)
    machines = -(-request.devices // devices_here(request.devices))

    def workload_of(model: Model) -> Workload:
        return replace(with_clip(model_workload(spec, model), request, size, windows), machines=machines)

    workload = workload_of(model)
    plan = _plan(request, workload, device, model.files.transformer.path)
    if workload.candidates:  # recorded, so that a resumed run uses the same file
        request = replace(request, quant=plan.weight_type)
        if plan.weight_type != workload.weight_type:  # another file in the folder suits this machine better
            model = model.with_type(spec, plan.weight_type)
            workload = workload_of(model)
    frames = sum(window.frames for window in windows)
    if plan.problem:
        raise SkyrunError(
            f"{size[0]}x{size[1]} with {frames} frames will not fit: {plan.problem}",
            (f"{plan.remedy}: " if plan.remedy else "")
            + "use a smaller --resolution or --size, fewer --seconds, or raise --max-vram or --max-ram",
            WILL_NOT_FIT,
        )
    workload = replace(workload, candidates=())
    return Job(
        request,
        inputs,
        model.files,
        model.encoder,
        model.vision,
        *size,
        frames,
        windows,
        device,
        workload,
        plan,
        model.passed_over,
        own.scale if own else 1,
        model.guess,
    )


def _of_model(request: Request, spec: TaskSpec) -> Request:
    """The request with the values of its model. Raises SkyrunError if it asks for what the model cannot do."""
    request = request.of(spec)
    if problems := value_problems(request):
        raise SkyrunError.listing("this cannot be run", problems, "see `skyrun run --help`")
    return request


def _plan(request: Request, workload: Workload, device: torch.device, model: Path) -> Plan:
    hardware = this_machine(device.type, model)
    check_attention(hardware, request.attention, request.dtype)
    return choose(
        hardware,
        with_density(workload, request.attention),
        precision=request.precision,
        attention=request.attention,
        dtype=request.dtype,
        max_vram=request.max_vram,
        max_ram=request.max_ram,
        prefer=request.prefer or PREFERENCES[0],
    )


def _open(request: Request) -> tuple[Inputs, Model]:
    """Open the inputs and the model. One SkyrunError lists everything that is wrong with them."""
    failures: list[SkyrunError] = []
    inputs = open_inputs(request, failures)
    try:
        model = choose_model(open_folder(request.model), request.spec, request.quant)
        model = model.adapted(request.loras)
    except SkyrunError as error:
        failures.append(error)
    if failures:
        first = failures[0]
        problems = [failure.message for failure in failures]
        raise SkyrunError.listing("this cannot be run", problems, first.hint, first.code)
    return inputs, model


def _check_outputs(request: Request, files: ModelFiles) -> None:
    """Raise SkyrunError if an output would replace a file of the model."""
    parts = {path.resolve() for path in files.parts.values()}
    for place in (request.output, request.save_latents):
        if place is not None and place.resolve() in parts:
            raise SkyrunError(f"{place} is a file of the model, it would be lost", "choose another name")


def _unused(request: Request) -> Iterator[str]:
    """A negative prompt of one's own that nothing uses."""
    if not request.is_guided and request.negative_prompt not in (None, "", request.spec.negative):
        yield "the negative prompt has no effect with --guidance 1; --nag makes use of it"


def _turned(height: int, width: int, shape: tuple[int, int]) -> Iterator[str]:
    """A clip that is high where what it is made from is wide, or the other way: perhaps the sides were exchanged."""
    rows, cols = shape
    if (height > _OBLONG * width and cols > _OBLONG * rows) or (width > _OBLONG * height and rows > _OBLONG * cols):
        clip, image = ("high", "wide") if height > width else ("wide", "high")
        yield (
            f"the clip is {clip}, {height} high and {width} wide, but what it is made from is {image}; "
            f"--size takes the height first, --size {width}x{height} would be {image}"
        )
