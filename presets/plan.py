"""Decide once how a clip is made: file, numbers' type, what stays in memory, and what each stage will take."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from skyrun.presets.alternatives import what_fits
from skyrun.presets.autoencoder import Autoencoder, fit
from skyrun.presets.hardware import Hardware
from skyrun.presets.memory import (
    CONTEXT_BYTES,
    GIB,
    PROCESS_BYTES,
    RESERVE_BYTES,
    RESERVE_SHARE,
    denoise_bytes,
    parked_bytes,
    staging_bytes,
    text_bytes,
)
from skyrun.presets.timing import Time, decode_time, denoise_time, images_time, step_time, text_time
from skyrun.presets.workload import Workload

EXACT_TYPES = ("F32", "F16", "BF16", "Q8_0")  # int8 products would add visibly to the error of these
POOR_TYPES = ("Q3_K", "Q2_K")  # visibly worse clips: taken where nothing better fits, or where they are asked for
PREFERENCES = ("quality", "speed", "memory")
WORTH_GAIN = 1.1  # times quicker than exact that int8 has to be
RING_SLOTS = 3  # the block in use, the next one, and the one being read
_NEARLY = 1.03  # times the quickest: better numbers are worth that
_FEWEST_ROWS = 512  # tokens at a time


@dataclass(frozen=True)
class StagePlan:
    """What a stage is expected to take: bytes, on a CPU all of them host memory, and seconds.

    bound: what it waits for: "compute", "disk" or "link". hidden: the share of reading that happens behind computing.
    """

    name: str
    device_bytes: int
    host_bytes: int
    seconds: float = 0.0
    bound: str = ""
    hidden: float = 1.0


@dataclass(frozen=True)
class Plan:
    """How a clip will be made. Frozen: what the run does is what was printed.

    weight_type: of the transformer file that was chosen. precision: "exact", or "fast": linear layers and attention in
    int8.
    token_rows: how many tokens pass through a block at a time, None: all. parked_tokens: they wait on the host.
    vae_tile: height and width in pixels that the autoencoder's convolutions work on at a time, None: whole frames.
    vae_room: bytes of the device for what they remember of earlier frames, the rest waits on the host; None: all of it.
    step_seconds: of a denoising step after the first.
    problem: why it will not fit, and remedy: what would; empty if it does fit.
    """

    device: str
    device_name: str
    precision: str
    dtype: str
    vae_dtype: str
    vae_tile: tuple[int, int] | None
    vae_room: int | None
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

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self) | {"seconds": self.seconds}

    @property
    def peak_bytes(self) -> int:
        """The most that any stage takes on the device; on a CPU, of host memory."""
        return max(stage.device_bytes if self.device == "cuda" else stage.host_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)


@dataclass(frozen=True)
class _Budget:
    """Bytes that may be used. usable: of the device, with something to spare. base: taken before the first
    tensor."""

    cuda: bool
    limit: int
    usable: int
    host: int
    base: int


@dataclass(frozen=True)
class _Option:
    """One way to make the steps."""

    work: Workload
    precision: str
    dtype: str
    rows: int | None
    parked: bool
    resident: int
    device_bytes: int
    host_bytes: int
    fits: bool
    step: Time

    @property
    def memory(self) -> tuple[int, int]:
        return self.device_bytes, self.host_bytes

    @property
    def order(self) -> tuple[float, int, bool, int]:
        """The quickest first, then what reads less."""
        return self.step.seconds, -self.resident, self.parked, -(self.rows or self.work.tokens)


def choose(
    hardware: Hardware,
    workload: Workload,
    *,
    precision: str | None = None,
    dtype: str | None = None,
    max_vram: float | None = None,
    max_ram: float | None = None,
    prefer: str = "quality",
) -> Plan:
    """The best plan for this hardware. max_vram, max_ram: limits in GiB instead of what is free.

    prefer: "quality" takes the best file whose reading is hidden behind computing, "speed" the quickest, "memory" what
    takes least. Blocks stay in memory only on a GPU: a CPU is slow enough that reading them again costs nothing. The
    plan of a workload that does not fit says so in `problem`, and in `remedy` what would fit.
    """
    budget = _budget(hardware, max_vram, max_ram)
    dtype = dtype or (("bfloat16" if hardware.bfloat16 else "float16") if budget.cuda else "float32")
    plan = _decide(hardware, workload, budget, precision, dtype, prefer)
    if not plan.problem:
        return plan

    def fits(smaller: Workload) -> bool:
        return not _decide(hardware, smaller, budget, precision, dtype, prefer).problem

    return replace(plan, remedy=what_fits(workload, fits))


def _decide(
    hardware: Hardware, workload: Workload, budget: _Budget, precision: str | None, dtype: str, prefer: str
) -> Plan:
    option = _best([*_options(hardware, workload, budget, precision, dtype, prefer != "memory")], prefer)
    work = option.work
    taken = option.device_bytes if budget.cuda else option.host_bytes
    room = taken if prefer == "memory" else budget.usable
    vae = fit(work, dtype, room - budget.base, park=budget.cuda, exact=prefer == "quality")
    denoise = denoise_time(hardware, work, option.step)
    stages = (
        _timed(_stage("text", work.text_block_bytes, text_bytes(work), budget), text_time(hardware, work)),
        _timed(_images_stage(work, vae, budget), images_time(hardware, work, vae)),
        _timed(StagePlan("denoise", option.device_bytes, option.host_bytes), denoise),
        _timed(_vae_stage("decode", vae, budget), decode_time(hardware, work, vae)),
    )
    plan = Plan(
        device=hardware.device,
        device_name=hardware.name,
        precision=option.precision,
        dtype=dtype,
        vae_dtype=vae.dtype,
        vae_tile=vae.tile,
        vae_room=vae.room,
        ring_slots=RING_SLOTS,
        resident_blocks=option.resident,
        token_rows=option.rows,
        parked_tokens=option.parked,
        stages=stages,
        limit_bytes=budget.limit,
        weight_type=work.weight_type,
        step_seconds=option.step.seconds,
    )
    return replace(plan, problem=_problem(plan, budget))


def _options(
    hardware: Hardware, workload: Workload, budget: _Budget, precision: str | None, dtype: str, keep: bool
) -> Iterator[_Option]:
    """Every file with every way to pass the tokens; keep: as many blocks stay in memory as fit then."""
    for work in workload.offers():
        how = precision or _precision(hardware, work)
        for rows, parked in _ways(work, budget.cuda):
            working = denoise_bytes(work, dtype, rows, parked)
            stage = _stage("denoise", work.block_bytes, working, budget, parked_bytes(work, dtype) if parked else 0)
            taken = stage.device_bytes if budget.cuda else stage.host_bytes
            fits = taken <= budget.limit and (not budget.cuda or stage.host_bytes <= budget.host)
            spare = max(0, budget.usable - taken) if budget.cuda and keep else 0
            resident = min(work.layers, spare // max(1, work.block_bytes))
            settings = {"fast": how == "fast", "dtype": dtype, "rows": rows, "parked": parked, "resident": resident}
            time = step_time(hardware, work, **settings)  # type: ignore[arg-type]
            device_bytes = stage.device_bytes + resident * work.block_bytes
            yield _Option(work, how, dtype, rows, parked, resident, device_bytes, stage.host_bytes, fits, time)


def _ways(workload: Workload, cuda: bool) -> list[tuple[int | None, bool]]:
    """How many tokens pass at a time, and whether they wait on the host."""
    counts = [-(-workload.tokens // parts) for parts in (2, 4, 8, 16, 32, 64, 128)]
    rows = [count for count in counts if count >= _FEWEST_ROWS]
    return [(None, False), *((count, parked) for parked in ((False, True) if cuda else (False,)) for count in rows)]


def _best(options: list[_Option], prefer: str) -> _Option:
    """By what is preferred. Files of poor types are only looked at where no other fits."""
    fitting = [option for option in options if option.fits]
    if not fitting or prefer == "memory":
        good = [option for option in fitting if option.work.weight_type not in POOR_TYPES]
        return min(good or fitting or options, key=lambda option: (option.memory, option.order))
    good = [option for option in fitting if option.work.weight_type not in POOR_TYPES] or _largest(fitting)
    if prefer == "speed":
        quickest = min(option.step.seconds for option in good)
        return min(_largest([o for o in good if o.step.seconds <= _NEARLY * quickest]), key=lambda o: o.order)
    hidden = [option for option in good if option.step.is_hidden]
    size = max(o.work.block_bytes for o in hidden) if hidden else min(o.work.block_bytes for o in good)
    return min((o for o in good if o.work.block_bytes == size), key=lambda o: o.order)


def _largest(options: list[_Option]) -> list[_Option]:
    size = max(option.work.block_bytes for option in options)
    return [option for option in options if option.work.block_bytes == size]


def _precision(hardware: Hardware, workload: Workload) -> str:
    gains = hardware.fast_gain >= WORTH_GAIN and workload.weight_type not in EXACT_TYPES
    return "fast" if gains else "exact"


def _budget(hardware: Hardware, max_vram: float | None, max_ram: float | None) -> _Budget:
    cuda = hardware.device == "cuda"
    host = hardware.ram_free if max_ram is None else min(int(max_ram * GIB), hardware.ram_free)
    if not cuda:
        return _Budget(False, host, host, host, PROCESS_BYTES)
    free = hardware.vram_free + CONTEXT_BYTES
    limit = free if max_vram is None else min(int(max_vram * GIB), free)
    return _Budget(True, limit, limit - max(RESERVE_BYTES, int(RESERVE_SHARE * limit)), host, CONTEXT_BYTES)


def _stage(name: str, block_bytes: int, working_bytes: int, budget: _Budget, waiting: int = 0) -> StagePlan:
    total = RING_SLOTS * block_bytes + working_bytes + budget.base
    if budget.cuda:
        return StagePlan(name, total, staging_bytes(block_bytes) + PROCESS_BYTES + waiting)
    return StagePlan(name, 0, total)


def _vae_stage(name: str, vae: Autoencoder, budget: _Budget) -> StagePlan:
    stage = _stage(name, 0, vae.working_bytes, budget)
    return replace(stage, host_bytes=stage.host_bytes + vae.parked_bytes)


def _images_stage(workload: Workload, vae: Autoencoder, budget: _Budget) -> StagePlan:
    """The autoencoder, or the tower that looks at pictures if that takes more."""
    encoding = _vae_stage("images", vae, budget)
    looking = _stage("images", workload.image_block_bytes, 0, budget)
    return replace(
        encoding,
        device_bytes=max(encoding.device_bytes, looking.device_bytes),
        host_bytes=max(encoding.host_bytes, looking.host_bytes),
    )


def _timed(stage: StagePlan, time: Time) -> StagePlan:
    return replace(stage, seconds=time.seconds, bound=time.bound, hidden=time.hidden)


def _problem(plan: Plan, budget: _Budget) -> str:
    if plan.peak_bytes > budget.limit:
        memory, limit, taken = "VRAM" if budget.cuda else "RAM", budget.limit, plan.peak_bytes
        worst = max(plan.stages, key=lambda stage: stage.device_bytes if budget.cuda else stage.host_bytes)
    else:
        worst = max(plan.stages, key=lambda stage: stage.host_bytes)
        memory, limit, taken = "RAM", budget.host, worst.host_bytes
    if taken <= limit:
        return ""
    return f"{worst.name} needs {taken / GIB:.1f} GiB of {memory}, {limit / GIB:.1f} GiB may be used"
