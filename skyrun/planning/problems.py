"""Find everything that is wrong with a request: with its values, and with the files and places that it names."""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.kernels.files.disk import existing_folder
from skyrun.kernels.machine.capability import FLOAT8
from skyrun.planning.request import Request
from skyrun.presets import Hardware
from skyrun.presets.attention import ATTENTIONS, parse_attention
from skyrun.presets.options import gains_by_skipping, lacks_float8
from skyrun.presets.plan import PREFERENCES
from skyrun.tasks import MODELS, TASKS, TaskSpec
from skyrun.tasks.sizes import GRID
from skyrun.tasks.windows import BLOCK, frames_of

DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("exact", "fast")
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
_MAX_SEED = (1 << 63) - 1
_MAX_STEPS = 1000
_MOST_DEVICES = 64
_MOST_GUIDANCE, _MOST_NAG, _MOST_SHIFT = 30, 100, 100
_DISTILLED = "its model is distilled, guidance and shift are built in"
_TRAINED_SECONDS = 5.1  # of a window, with a frame to spare; the position of a later frame was never seen in training
_TAG = re.compile(r"\s*(\[[A-Z_ -]+\])")


def check(request: Request) -> None:
    """Raise one SkyrunError that lists everything that is wrong with a request and the files and places it names."""
    problems = request.type_problems() or [*value_problems(request), *_world_problems(request)]
    if problems:
        raise SkyrunError.listing("this cannot be run", problems, "see `skyrun run --help`")


def parse_request(values: Any) -> Request:
    """The request that these values, made by `as_json`, describe. Raises SkyrunError if they are something else."""
    known = {field.name for field in fields(Request)}
    if not isinstance(values, dict) or not {"task", "prompt"} <= set(values) <= known:
        raise SkyrunError("these values are not a request", f"expected task, prompt, and of {', '.join(sorted(known))}")
    named: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    request = Request(**named)
    if problems := request.type_problems() or value_problems(request):
        raise SkyrunError.listing("these values are not a request", problems, "see `skyrun run --help`")
    return request


def value_problems(request: Request) -> list[str]:
    """What is wrong with the request's values."""
    if request.task not in TASKS:
        return [f"unknown task {request.task!r}, expected {' or '.join(TASKS)}", *shape_problems(request)]
    return of_some_model(request, _problems_with_model)


def of_some_model(request: Request, find: Callable[[Request], list[str]]) -> list[str]:
    """Problems of a request: if it is not known yet which model it has, those with the model that has the fewest."""
    models = [request] if request.variant is not None else [request.of(spec) for spec in MODELS[request.task]]
    if request.ar_step:  # is asked for with a model that has it, if the task has one
        models = [one for one in models if "ar_step" in one.spec.options] or models
    return min((find(one) for one in models), key=len)


def _problems_with_model(request: Request) -> list[str]:
    spec = request.spec
    return [
        *_input_problems(request, spec),
        *_transition_problems(request, spec),
        *guidance_problems(request, spec),
        *shape_problems(request),
        *_resolution_problems(request, spec),
        *length_problems(spec, request.frames, request.seconds),
        *choice_problems(request),
    ]


def length_problems(spec: TaskSpec, frames: int | None, seconds: float | None) -> list[str]:
    """Why the task cannot make a clip of that many frames or seconds."""
    shortest, longest = spec.seconds
    if frames is not None and not spec.takes_frames:
        return [f"{spec.name} has no --frames: use --seconds"]
    if frames is not None and seconds is not None:
        return [f"got {frames} frames and {seconds:g} seconds, expected one of them"]
    if frames is not None and (frames < 1 or frames % 4 != 1):
        nearest = max(0, round((frames - 1) / 4)) * 4 + 1
        return [f"{frames} frames are not 4 k + 1; the nearest is {nearest}"]
    if seconds is not None and not (seconds > 0 and shortest <= seconds <= longest):
        least = f"at least {shortest:g}" if shortest else "more than 0"
        return [f"got {seconds:g} seconds, expected {least} and at most {longest:g}"]
    if seconds is not None and spec.whole_seconds and seconds != int(seconds):
        return [f"got {seconds:g} seconds, {spec.name} makes clips of whole seconds"]
    if frames is not None and spec.most_frames is not None and frames > spec.most_frames:
        return [f"{frames} frames are too many, the model has positions for {spec.most_frames}"]
    return []


def place_problems(path: Path) -> list[str]:
    """Why a file cannot be written at `path`, checked before the work instead of after it."""
    if path.is_dir():
        return [f"{path} is a folder, expected the name of a file"]
    folder = existing_folder(path.parent)
    if not folder.is_dir():
        return [f"{path} cannot be written: {folder} is a file"]
    return [] if os.access(folder, os.W_OK) else [f"{path} cannot be written: {folder} is read-only"]


def _input_problems(request: Request, spec: TaskSpec) -> Iterator[str]:
    if not request.prompt.strip():
        yield "the prompt is empty: say with -p what the clip shows"
    fewest, most = spec.images
    if not fewest <= len(request.images) <= most:
        count = f"{fewest} to {most}" if fewest < most else str(most)
        yield (
            f"got {len(request.images)} {spec.image_name}, expected {count}"
            if most
            else f"{spec.name} takes no --image"
        )
    for name, file, wanted in (("video", request.video, spec.video), ("audio", request.audio, spec.audio)):
        if wanted is not (file is not None):
            yield f"{spec.name} takes {f'a --{name} file' if wanted else f'no --{name}'}"


def _transition_problems(request: Request, spec: TaskSpec) -> Iterator[str]:
    if request.join and "join" not in spec.options:
        yield f"{spec.name} has no --join"
    if "transition" not in spec.options:
        if request.transition is not None:
            yield f"{spec.name} has no --transition"
        return
    if request.transition is not None and request.transition not in spec.transitions:
        yield f"unknown transition {request.transition!r}, expected {', '.join(spec.transitions)}"
        return
    tags = spec.transitions.values()
    if (found := _TAG.match(request.prompt)) and found[1] not in tags:
        yield f"unknown tag {found[1]} in the prompt, expected {', '.join(tags)}"


def guidance_problems(request: Request, spec: TaskSpec) -> Iterator[str]:
    """Guidance, shift, rates and lags that the task's model does not have."""
    for name in ("guidance", "shift"):
        if getattr(request, name) is not None and name not in spec.options:
            yield f"{spec.name} has no --{name}: {_DISTILLED}"
    if request.negative_prompt is not None and spec.guidance is None and request.nag is None:
        yield f"{spec.name} takes --negative-prompt only with --nag: {_DISTILLED}"
    if request.nag is not None and not 1 < request.nag <= _MOST_NAG:
        yield f"--nag {request.nag:g} is not a scale, expected more than 1, which would do nothing, to {_MOST_NAG}"
    if request.guidance is not None and not 1 <= request.guidance <= _MOST_GUIDANCE:
        yield f"--guidance {request.guidance:g} is not a scale, expected 1, which does without, to {_MOST_GUIDANCE}"
    if request.shift is not None and not 0 < request.shift <= _MOST_SHIFT:
        yield f"--shift {request.shift:g}, expected a number above 0 and at most {_MOST_SHIFT}"
    if request.fps is not None and request.fps not in (spec.fps, *spec.rates):
        has = " or ".join(map(str, spec.rates)) or f"only {spec.fps}"
        yield f"--fps {request.fps}: the model has {has} frames per second"
    if request.ar_step:
        yield from _stagger_problems(request, spec)
    if request.variant is not None and request.variant not in [model.model for model in MODELS[spec.name]]:
        yield f"unknown variant {request.variant!r} of {spec.name}"


def _stagger_problems(request: Request, spec: TaskSpec) -> Iterator[str]:
    if "ar_step" not in spec.options:
        yield f"{spec.name} has no --ar-step with this model: it is for those of diffusion forcing"
    elif request.images:
        yield "--ar-step and --image do not go together: the first block of frames has its timestep as a whole"
    elif request.ar_step < 0:
        yield f"--ar-step {request.ar_step}, expected 0 or more"
    elif length_problems(spec, request.frames, request.seconds):
        return  # said already, and such a length may have no windows, or very many
    elif any((window.latents + window.others) % BLOCK for window in request.windows()):
        near = frames_of(max(1, round(request.latent_frames / BLOCK)) * BLOCK)
        yield f"--ar-step needs windows of whole blocks of {BLOCK} latent frames; the nearest length is --frames {near}"


def shape_problems(request: Request) -> Iterator[str]:
    """Why frames cannot have that size."""
    size = request.size
    if isinstance(size, str):
        yield f"size {size!r} is not HxW, height and width in pixels, such as 480x832"
    elif size is not None and not (min(size) >= GRID and all(side % GRID == 0 for side in size)):
        near = "x".join(str(max(GRID, round(side / GRID) * GRID)) for side in size)
        yield f"size {size[0]}x{size[1]} is not on the grid of {GRID} pixels; the nearest is {near}"


def _resolution_problems(request: Request, spec: TaskSpec) -> Iterator[str]:
    if request.size is None and request.resolution is not None and request.resolution not in spec.resolutions:
        yield f"unknown resolution {request.resolution!r}, expected {', '.join(spec.resolutions)}"
    for name, least in (("condition_frames", 1), ("window_frames", 21)):
        if (count := getattr(request, name)) is not None and (count < least or count % 4 != 1):
            yield f"{name} = {count}, expected 4 k + 1 and at least {least}"
    if request.latent_rate < 1:
        yield f"latent_rate = {request.latent_rate}, expected at least 1"


def choice_problems(request: Request) -> Iterator[str]:
    """Steps, seeds, devices and limits that cannot be."""
    if request.steps is not None and not 1 <= request.steps <= _MAX_STEPS:
        yield f"got {request.steps} steps, expected 1 to {_MAX_STEPS}"
    if request.seed is not None and not 0 <= request.seed <= _MAX_SEED:
        yield f"seed {request.seed} is not between 0 and {_MAX_SEED}"
    if request.device is not None and not _DEVICE.fullmatch(request.device):
        yield f"unknown device {request.device!r}, expected cuda, cuda:N or cpu"
    if not 1 <= request.devices <= _MOST_DEVICES:
        yield f"got {request.devices} devices, expected 1 to {_MOST_DEVICES}"
    elif request.devices > 1 and ":" in (request.device or ""):
        yield f"--device {request.device} is one card: leave it out, or --devices {request.devices}"
    for name, value, known in (
        ("dtype", request.dtype, DTYPES),
        ("precision", request.precision, PRECISIONS),
        ("preference", request.prefer, PREFERENCES),
    ):
        if value is not None and value not in known:
            yield f"unknown {name} {value!r}, expected {', '.join(known[:-1])} or {known[-1]}"
    try:
        parse_attention(request.attention or ATTENTIONS[0])
    except ValueError as error:
        yield str(error)
    yield from (problem for lora in request.loras if (problem := lora.problem))
    for option, limit in (("--max-vram", request.max_vram), ("--max-ram", request.max_ram)):
        if limit is not None and not 0 < limit < math.inf:
            yield f"{option} {limit:g} GiB is not a limit, expected a number above 0"
    if request.output is not None and request.output.suffix.lower() != ".mp4":
        yield f"{request.output} does not end in .mp4"


def _world_problems(request: Request) -> Iterator[str]:
    """Inputs that do not exist, and outputs that cannot be written or would replace an input."""
    files = [file for file in (*request.images, request.video, request.audio) if file is not None]
    files += [lora.path for lora in request.loras if not lora.on_hub]
    for file in files:
        if not file.is_file():
            yield f"{file} is a folder" if file.is_dir() else f"{file} does not exist"
    places = [path for path in (request.output, request.save_latents) if path is not None]
    for path in places:
        yield from place_problems(path)
    if len({path.resolve() for path in places}) < len(places):
        yield f"the clip and the latents cannot both be {places[0]}"
    yield from lost_inputs(places, files)


def lost_inputs(places: Iterable[Path], inputs: Iterable[Path]) -> Iterator[str]:
    """Outputs that would replace an input of the clip."""
    taken = {file.resolve() for file in inputs}
    for place in places:
        if place.resolve() in taken:
            yield f"{place} is what the clip is made from, it would be lost"


def check_attention(hardware: Hardware, attention: str | None, dtype: str | None = None) -> None:
    """Raise SkyrunError if attention is asked for in a way that the card does not have. dtype: that is asked for."""
    if not attention:
        return
    asked = parse_attention(attention)
    if lacks_float8(hardware, asked.precision):
        raise SkyrunError(
            f"--attention fp8 needs a card of the RTX 4000 series or later (compute capability "
            f"{FLOAT8[0]}.{FLOAT8[1]}), {hardware.name} has {hardware.capability[0]}.{hardware.capability[1]}",
            "use --attention full-int8, which is more accurate, or leave it to the plan",
        )
    kind = dtype or ("bfloat16" if hardware.bfloat16 else "float16")
    if asked.bound and hardware.device == "cuda" and not gains_by_skipping(hardware, kind):
        raise SkyrunError(
            f"--attention sparse needs a card of the RTX 3000 series or later, Triton, and activations in 16 bits; "
            f"this is {hardware.name} with {kind}",
            "leave out sparse; `skyrun doctor` says whether Triton is there",
        )


def check_devices(request: Request, heads: int) -> None:
    """Raise SkyrunError if the attention of a transformer with so many heads cannot be divided among the devices."""
    if request.devices > 1 and request.attention is not None and parse_attention(request.attention).bound is not None:
        raise SkyrunError(
            f"attention skips tiles on one device only, and there are {request.devices}",
            "leave out sparse, or --devices",
        )
    if heads % request.devices:
        fitting = [str(count) for count in range(1, heads + 1) if heads % count == 0]
        raise SkyrunError(
            f"{heads} heads of attention cannot be divided among {request.devices} devices",
            f"with this model --devices can be {', '.join(fitting[:-1])} or {fitting[-1]}",
        )


def too_long(windows: int, seconds: float) -> Iterator[str]:
    """A clip that is made at once and longer than those that the model was trained on."""
    if windows == 1 and seconds > _TRAINED_SECONDS:
        yield (
            f"the model was not made for {seconds:.1f} s at once, it was trained on 5 s: expect repetition and drift"
        )
