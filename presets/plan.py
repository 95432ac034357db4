"""Decide how a clip is made: the file, the dtype, which blocks stay in memory, and what each stage will take."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

from skyrun.presets.advice import PATIENCE, USUAL_CARD, cost, gain, without_card
from skyrun.presets.alternatives import smallest, what_fits
from skyrun.presets.attention import USUAL_BOUND, Attention, parse_attention
from skyrun.presets.autoencoder import WAYS, Autoencoder, autoencoder
from skyrun.presets.budget import Budget, budget_of
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import Hardware, stated
from skyrun.presets.memory import ALLOCATOR_BYTES, GIB, RING_SLOTS, text_bytes
from skyrun.presets.options import (
    EXACT_TYPES,
    POOR_TYPES,
    PREFERENCES,
    SKIPPING_GAIN,
    Option,
    best,
    density_of,
    gains_by_skipping,
    options,
    usual_attention,
)
from skyrun.presets.timing import (
    Time,
    decode_time,
    first_step_time,
    images_time,
    load_time,
    start_time,
    text_time,
    write_time,
)
from skyrun.presets.workload import Workload

__all__ = ["EXACT_TYPES", "GIB", "POOR_TYPES", "PREFERENCES", "Plan", "StagePlan", "choose"]

_USUAL_RAM, _USUAL_DISK = 16, 0.5  # GiB of RAM and GB/s of the disk in a machine with the usual card


@dataclass(frozen=True)
class StagePlan:
    """What a stage is expected to take: peak memory in bytes, which is all host memory on a CPU, and seconds.

    bound: what limits its speed: "compute", "disk" or "link". hidden: the share of reading that overlaps computing.
    """

    name: str
    device_bytes: int
    host_bytes: int
    seconds: float = 0.0
    bound: str = ""
    hidden: float = 1.0


@dataclass(frozen=True)
class AttentionPlan:
    """What a way of attention takes: `attention` as --attention has it; the density of its tiles, 1 if all are read.

    density_measured: whether an earlier run has measured it. step_seconds: of a step after the first. seconds: in all.
    """

    attention: str
    density: float
    density_measured: bool
    step_seconds: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """How a clip will be made. It is frozen: the run does exactly what was printed.

    weight_type: type of the chosen transformer file. precision: of linear layers, "exact" or "fast" for int8.
    attention: its precision, of ATTENTIONS. sparse: the relative error that self-attention may cost by skipping tiles;
    None: it skips nothing. beside: it with and without skipping. dtype: of activations. ring_slots: streaming buffers,
    one block each. resident_blocks: blocks that stay on the device. token_rows: how many tokens pass through a block at
    a time; None stands for all. parked_tokens: whether the other tokens wait on the host.
    encoding, decoding: how the VAE works. step_seconds, first_step_seconds: expected for a denoising step after the
    first, and for the first, which reads every block from disk.
    problem: why the plan does not fit; empty if it fits. remedy: what would fit instead.
    notes: sentences that say what takes long and how to make it faster. devices: how many make the clip together; all
    bytes are those of one of them. weights: "own" if each of them reads all blocks from disk for itself, "shared" if it
    reads a share of each and gets the rest from the others of its machine.
    """

    device: str
    device_name: str
    precision: str
    attention: str
    dtype: str
    encoding: Autoencoder
    decoding: Autoencoder
    ring_slots: int
    resident_blocks: int
    token_rows: int | None
    parked_tokens: bool
    stages: tuple[StagePlan, ...]
    limit_bytes: int
    problem: str = ""
    remedy: str = ""
    weight_type: str = ""
    step_seconds: float = 0.0
    first_step_seconds: float = 0.0
    notes: tuple[str, ...] = ()
    devices: int = 1
    weights: str = "own"
    sparse: float | None = None
    beside: tuple[AttentionPlan, ...] = ()

    @property
    def asked(self) -> str:
        """The attention as --attention has it."""
        return str(Attention(self.attention, self.sparse))

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self) | {"seconds": self.seconds}

    @property
    def peak_bytes(self) -> int:
        """The most memory that any stage takes on the device; on a CPU, the most host memory."""
        return max(stage.device_bytes if self.device == "cuda" else stage.host_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """The expected time of all stages together."""
        return sum(stage.seconds for stage in self.stages)


def choose(
    hardware: Hardware,
    workload: Workload,
    *,
    precision: str | None = None,
    attention: str | None = None,
    dtype: str | None = None,
    max_vram: float | None = None,
    max_ram: float | None = None,
    prefer: str = "balanced",
) -> Plan:
    """The best plan for this hardware.

    If the workload does not fit, the plan's `problem` says why and its `remedy` what would fit. If another plan that
    fits is noticeably faster, its `notes` say how to select it. Blocks stay in memory only on a GPU: a CPU computes so
    slowly that reading them again costs no time.

    Args:
        hardware: the machine.
        workload: the clip and its models.
        precision: "exact" or "fast"; None chooses what suits the file's type and the card.
        attention: as `parse_attention` reads it. What it leaves open is what is faster, and exact if `precision` is;
            tiles are skipped unasked only where that saves 15 % and neither quality nor memory is preferred.
        dtype: of activations; None chooses one for the device.
        max_vram: a limit in GiB; None allows all that is free.
        max_ram: a limit in GiB; None allows all that is free.
        prefer: "balanced" and "quality" choose the best file whose reading is hidden behind computing, "quality" with
            more accurate attention too; "speed" the fastest option; "memory" the one that takes the least memory.
    """
    budget = budget_of(hardware, max_vram, max_ram, workload.devices)
    kind = dtype or (("bfloat16" if hardware.bfloat16 else "float16") if budget.cuda else "float32")
    asked = parse_attention(attention) if attention else Attention()

    @cache
    def found(work: Workload, attention: str, bound: float | None, keep: bool) -> list[Option]:
        return [*options(hardware, work, budget, precision, attention, bound, kind, keep)]

    @cache
    def decided(work: Workload, prefer: str, type: str | None, bound: float | None) -> Plan:
        chosen = asked.precision or usual_attention(hardware, precision, prefer)
        listed = found(work, chosen, bound, prefer != "memory")
        allowed = [option for option in listed if type in (None, option.work.weight_type)]
        return _plan(hardware, best(allowed, prefer), budget, kind, prefer)

    def decide(work: Workload, prefer: str = prefer, type: str | None = None) -> Plan:
        dense = decided(work, prefer, type, None)
        sparse = decided(work, prefer, type, USUAL_BOUND if asked.bound is None else asked.bound)
        open_ = asked == Attention() and precision != "exact" and prefer in ("balanced", "speed")
        gains = gains_by_skipping(hardware, kind) and sparse.seconds <= SKIPPING_GAIN * dense.seconds
        takes = asked.bound is not None or (open_ and gains and not sparse.problem)
        return replace(sparse if takes else dense, beside=(_beside(dense, work), _beside(sparse, work)))

    plan = decide(workload)
    if plan.problem:
        return replace(
            plan, remedy=what_fits(workload, lambda smaller: not decided(smaller, prefer, None, plan.sparse).problem)
        )
    return replace(plan, notes=tuple(_notes(plan, workload, prefer, decide)))


def _notes(plan: Plan, workload: Workload, prefer: str, decide: Callable[..., Plan]) -> Iterator[str]:
    types = {work.weight_type for work in workload.offers()}
    poor = [type for type in POOR_TYPES if type in types and plan.weight_type not in POOR_TYPES]
    quicker = chain(
        [("--prefer speed", decide(workload, "speed"), "memory" if prefer == "memory" else "quality")],
        ((f"--quant {type}", decide(workload, type=type), "quality") for type in poor),
    )
    gains = (gain(plan, other, option, what_for) for option, other, what_for in quicker)
    note = next(filter(None, gains), "")
    if note := note or (cost(plan, decide(workload, "quality")) if prefer == "speed" else ""):
        yield note
    if plan.device == "cpu" and plan.seconds > PATIENCE:
        card = find_card(USUAL_CARD)
        assert card is not None
        smaller = smallest(workload)
        there = choose(stated(card, _USUAL_RAM, _USUAL_DISK), workload, prefer=prefer)
        yield without_card(plan, there, smaller, decide(smaller))


def _beside(plan: Plan, work: Workload) -> AttentionPlan:
    density = density_of(work) if plan.sparse else 1.0
    return AttentionPlan(plan.asked, density, work.density > 0, plan.step_seconds, plan.seconds)


def _plan(hardware: Hardware, option: Option, budget: Budget, dtype: str, prefer: str) -> Plan:
    """Complete an option for the denoising steps with the other stages."""
    work, (rows, parked) = option.work, option.chunking
    taken = option.device_bytes if budget.cuda else option.host_bytes
    room = taken - ALLOCATOR_BYTES * budget.cuda if prefer == "memory" else budget.usable
    short = budget.cuda and hardware.bfloat16 and dtype != "float32"
    encoding, decoding = (autoencoder(work, way, budget.working(room), budget.cuda, short) for way in WAYS)
    images = _timed(_images_stage(work, encoding, budget), images_time(hardware, work, encoding))
    kept = option.resident * work.block_bytes
    stages = (
        _timed(_stage("start", budget, 0, 0), start_time(hardware)),
        _timed(_stage("text", budget, work.text_block_bytes, text_bytes(work)), text_time(hardware, work)),
        *([images] if work.encoded_frames or work.image_layers else []),
        _timed(_stage("load", budget, work.block_bytes, work.outer_bytes, kept), load_time(hardware, work)),
        _timed(StagePlan("denoise", option.device_bytes, option.host_bytes), option.denoise),
        _timed(_vae_stage("decode", decoding, budget), decode_time(hardware, work, decoding)),
        _timed(_stage("write", budget, 0, 0), write_time(work)),
    )
    plan = Plan(
        device=hardware.device,
        device_name=hardware.name,
        precision=option.precision,
        attention=option.attention,
        dtype=dtype,
        encoding=encoding,
        decoding=decoding,
        ring_slots=RING_SLOTS,
        resident_blocks=option.resident,
        token_rows=rows,
        parked_tokens=parked,
        stages=stages,
        limit_bytes=budget.limit,
        weight_type=work.weight_type,
        step_seconds=option.step.seconds,
        first_step_seconds=first_step_time(hardware, work, option.first, option.shared).seconds,
        devices=work.devices,
        weights="shared" if option.shared else "own",
        sparse=option.bound,
    )
    return replace(plan, problem=_problem(plan, budget))


def _stage(name: str, budget: Budget, block_bytes: int, working_bytes: int, kept: int = 0) -> StagePlan:
    """kept: bytes of blocks that stay on the GPU."""
    device, host = budget.taken(block_bytes, working_bytes)
    return StagePlan(name, device + kept, host)


def _vae_stage(name: str, vae: Autoencoder, budget: Budget) -> StagePlan:
    stage = _stage(name, budget, 0, vae.working_bytes)
    return replace(stage, host_bytes=stage.host_bytes + vae.host_bytes)


def _images_stage(workload: Workload, vae: Autoencoder, budget: Budget) -> StagePlan:
    """The memory of the VAE, or of the image encoder if that takes more."""
    encoding = _vae_stage("images", vae, budget)
    vision = _stage("images", budget, workload.image_block_bytes, 0)
    return replace(
        encoding,
        device_bytes=max(encoding.device_bytes, vision.device_bytes),
        host_bytes=max(encoding.host_bytes, vision.host_bytes),
    )


def _timed(stage: StagePlan, time: Time) -> StagePlan:
    return replace(stage, seconds=time.seconds, bound=time.bound, hidden=time.hidden)


def _problem(plan: Plan, budget: Budget) -> str:
    if plan.peak_bytes > budget.limit:
        memory, limit, taken = "VRAM" if budget.cuda else "RAM", budget.limit, plan.peak_bytes
        worst = max(plan.stages, key=lambda stage: stage.device_bytes if budget.cuda else stage.host_bytes)
    else:
        worst = max(plan.stages, key=lambda stage: stage.host_bytes)
        memory, limit, taken = "RAM", budget.host, worst.host_bytes
    if taken <= limit:
        return ""
    return f"{worst.name} needs {taken / GIB:.1f} GiB of {memory}, {limit / GIB:.1f} GiB may be used"
