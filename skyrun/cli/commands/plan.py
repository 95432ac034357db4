"""`skyrun plan`: predict memory and time of a clip, with the origin of every number."""

from argparse import Namespace
from collections.abc import Iterator

from skyrun.cli.console import display, emit, say
from skyrun.cli.progress import shown
from skyrun.errors import WILL_NOT_FIT, SkyrunError
from skyrun.hub.adapters import fetch_adapters
from skyrun.hub.local import wanted_name, whole_folder
from skyrun.hub.store import Name, sources_text
from skyrun.planning.lora import parse_lora
from skyrun.planning.request import Request
from skyrun.planning.what_if import Planned, plan_request, stated_hardware
from skyrun.presets import Hardware, Plan
from skyrun.presets.advice import precisions
from skyrun.presets.autoencoder import Autoencoder
from skyrun.presets.machine.cards import card_rows
from skyrun.tasks import TASKS
from skyrun.units import GIB, duration, size, table

_MACHINE = ("gpu", "like", "vram", "ram", "disk")  # options that describe another machine


def execute(arguments: Namespace) -> int:
    """Plan a clip, on this machine or another one. Returns exit code 3 if it will not fit."""
    if arguments.gpu == "list":
        display(table(card_rows()))
        return 0
    if arguments.task is None:
        raise SkyrunError("say which task to plan for", f"skyrun plan {', '.join(TASKS)}; --gpu list lists cards")
    missing = _use_pulled_model(arguments)
    request = Request(
        arguments.task,
        "",
        model=arguments.model,
        quant=arguments.quant,
        size=arguments.size,
        resolution=arguments.resolution,
        frames=arguments.frames,
        seconds=arguments.seconds,
        steps=arguments.steps,
        guidance=arguments.guidance,
        devices=1 if arguments.devices is None else arguments.devices,
        nag=arguments.nag,
        variant=arguments.variant,
        precision=arguments.precision,
        attention=arguments.attention,
        prefer=arguments.prefer,
        loras=shown(fetch_adapters([parse_lora(text) for text in arguments.lora], dry_run=True), False),
    )
    parts = {name: getattr(arguments, name) for name in _MACHINE}
    planned = plan_request(request, stated_hardware(arguments.preset, arguments.model, **parts))
    if missing is not None:
        say(sources_text(missing, planned.model_bytes))
    if arguments.plot:
        from skyrun.cli.plan_chart import write_plan_chart

        write_plan_chart(arguments.plot, planned)
        say(f"{arguments.plot}: memory over the run, and the time of a step against its tokens")
    if arguments.json:
        emit({"event": "plan"} | planned.as_json())
    else:
        display(planned_text(planned))
    return WILL_NOT_FIT if planned.plan.problem else 0


def _use_pulled_model(arguments: Namespace) -> Name | None:
    """Plan with the model that is named, or on this machine with the one that a run would use.

    Returns its name if it is not there.
    """
    arguments.variant = None
    elsewhere = [getattr(arguments, name) for name in ("preset", *_MACHINE)]
    name = wanted_name(str(arguments.model) if arguments.model else None, arguments.task, arguments.quant)
    if name is None or (arguments.model is None and any(value is not None for value in elsewhere)):
        return None
    if folder := whole_folder(name):
        arguments.model, arguments.quant = folder, None
        return None
    arguments.model, arguments.quant = None, name.quant or None
    arguments.variant = name.variant
    return name


def planned_text(planned: Planned) -> str:
    """The output of `skyrun plan`."""
    plan, work = planned.plan, planned.workload
    lines = [
        f"{work.task}: {work.height}x{work.width} (height x width), {work.frames} frames, "
        + (f"{work.windows} windows of {work.steps} steps" if work.windows > 1 else f"{work.steps} steps")
        + f", {work.tokens} tokens",
        hardware_text(planned.hardware, planned.plan.devices),
        choice_text(planned),
        stages_text(plan),
        *attention_lines(plan),
    ]
    if plan.problem:
        lines.append(f"it will not fit: {plan.problem}" + (f"; {plan.remedy}" if plan.remedy else ""))
    else:
        lines.append(
            f"{duration(plan.seconds)} in all, {duration(plan.step_seconds)} a step, "
            f"{duration(plan.first_step_seconds)} the first; speeds are {origin(planned)}"
        )
        lines += scaling(planned)
        lines += ["it rests on:", *(f"  {text}" for text in planned.assumptions)]
    lines += plan.notes
    return "\n".join(lines)


def scaling(planned: Planned) -> Iterator[str]:
    """What several devices gain over one."""
    alone, plan = planned.alone, planned.plan
    if alone is None:
        return
    yield weights_text(plan)
    memory = f"{plan.devices} devices take {plan.peak_bytes / GIB:.1f} GiB each"
    if alone.problem:
        yield f"{memory}; for one it will not fit: {alone.problem}"
        return
    seconds, step = plan.seconds / alone.seconds, plan.step_seconds / alone.step_seconds
    yield (
        f"{memory}, {seconds:.2f} of the time of one and {step:.2f} of its step; one takes "
        f"{alone.peak_bytes / GIB:.1f} GiB, {duration(alone.seconds)} in all, {duration(alone.step_seconds)} a step"
    )


def weights_text(plan: Plan) -> str:
    """How several devices get the weights."""
    if plan.weights == "own":
        return "each device reads all weights for itself: to read a share of them would gain nothing"
    return (
        "each device reads a share of the weights from disk and gets the rest from the others: to read all for itself "
        "would take longer"
    )


def hardware_text(hardware: Hardware, devices: int = 1) -> str:
    """The machine in one line, each number with its origin. devices: how many of its kind are used."""

    def said(name: str, text: str) -> str:
        return f"{text} ({hardware.origin(name)})"

    parts = [hardware.name]
    if hardware.device == "cuda":
        parts.append(
            said("vram_free", f"{hardware.vram_free / GIB:.1f} of {hardware.vram_total / GIB:.1f} GiB VRAM free")
        )
    parts.append(said("ram_free", f"{hardware.ram_free / GIB:.1f} of {hardware.ram_total / GIB:.1f} GiB RAM free"))
    parts.append(said("disk_rate", f"disk {hardware.disk_rate / 1e9:.2f} GB/s"))
    if hardware.device == "cuda":
        parts.append(said("link_rate", f"link {hardware.link_rate / 1e9:.0f} GB/s"))
    if devices > 1:
        parts[0] = f"{devices} x {parts[0]}"
        parts.append(said("peer_rate", f"{hardware.peer_rate / 1e9:.1f} GB/s between devices"))
    return ", ".join(parts)


def choice_text(planned: Planned) -> str:
    """What the plan has chosen."""
    plan, work = planned.plan, planned.workload
    dtypes = plan.dtype + precisions(plan)
    file = f"a file of {size(planned.transformer_bytes)}"
    kept = blocks_text(plan.resident_blocks, work.layers)
    rows = f"{plan.token_rows} tokens at a time" if plan.token_rows else "all tokens at once"
    waiting = ", the others wait on the host" if plan.parked_tokens else ""
    return f"{plan.weight_type} in {dtypes}, {file}; {kept}; {rows}{waiting}; {autoencoder_text(plan)}"


def attention_lines(plan: Plan) -> list[str]:
    """Attention with and without skipping, each with what it takes."""
    lines = []
    for one in plan.beside:
        origin = "measured" if one.density_measured else "assumed"
        read = f", reading {one.density:.0%} of its tiles ({origin})" if one.density < 1 else ""
        mark = " <- planned" if one.attention == plan.asked else ""
        times = f"{duration(one.step_seconds)} a step, {duration(one.seconds)} in all"
        lines.append(f"attention {one.attention}{read}: {times}{mark}")
    return lines


def autoencoder_text(plan: Plan) -> str:
    """How the VAE encodes and decodes."""

    def said(vae: Autoencoder) -> str:
        return vae.dtype + (f" in slabs of {vae.tile[0]} rows" if vae.tile else "")

    return f"autoencoder encodes in {said(plan.encoding)}, decodes in {said(plan.decoding)}"


def blocks_text(resident: int, layers: int) -> str:
    """How many blocks of the transformer stay in memory."""
    if resident == layers:
        return "all blocks stay in memory"
    if not resident:
        return "all blocks are streamed from disk"
    return f"{resident} of {layers} blocks stay in memory, the others are streamed from disk"


def stages_text(plan: Plan) -> str:
    """A table with memory and time of each stage."""
    cuda = plan.device == "cuda"
    rows = [["  stage", *(["VRAM GiB"] if cuda else []), "RAM GiB", "time", "waits for", "reading hidden"]]
    for stage in plan.stages:
        sizes = [stage.device_bytes, stage.host_bytes] if cuda else [stage.host_bytes]
        reads = f"{stage.hidden:.0%}" if stage.name in ("text", "denoise") else "-"
        texts = [f"{nbytes / GIB:.2f}" for nbytes in sizes]
        rows.append([f"  {stage.name}", *texts, duration(stage.seconds), stage.bound, reads])
    return table(rows)


def origin(planned: Planned) -> str:
    """Where the compute rates come from."""
    return planned.hardware.origin("rates")
