"""Decide once how a clip is made: numbers' type, what stays in memory, and how much each stage will take."""

from dataclasses import asdict, dataclass, replace
from typing import Any

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
from skyrun.presets.workload import Workload

EXACT_TYPES = ("F32", "F16", "BF16", "Q8_0")  # int8 products would add visibly to the error of these
WORTH_GAIN = 1.1  # times quicker than exact that int8 has to be
_GOOD_ROWS, _FEWEST_ROWS = 4096, 512  # tokens at a time
RING_SLOTS = 3  # the block in use, the next one, and the one being read


@dataclass(frozen=True)
class StagePlan:
    """What a stage is expected to take, in bytes. On a CPU everything is host memory."""

    name: str
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class Plan:
    """How a clip will be made. Frozen: what the run does is what was printed.

    precision: "exact", or "fast": linear layers and attention in int8.
    token_rows: how many tokens pass through a block at a time, None: all. parked_tokens: they wait on the host.
    vae_tile: height and width in pixels that the autoencoder's convolutions work on at a time, None: whole frames.
    vae_room: bytes of the device for what they remember of earlier frames, the rest waits on the host; None: all of it.
    problem: why it will not fit; empty if it will.
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

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)

    @property
    def peak_bytes(self) -> int:
        """The most that any stage takes on the device; on a CPU, of host memory."""
        return max(stage.device_bytes if self.device == "cuda" else stage.host_bytes for stage in self.stages)


def choose(
    hardware: Hardware,
    workload: Workload,
    *,
    precision: str | None = None,
    dtype: str | None = None,
    max_vram: float | None = None,
    max_ram: float | None = None,
) -> Plan:
    """The best plan for this hardware. max_vram, max_ram: limits in GiB instead of what is free.

    Blocks stay in memory only on a GPU, as many as fit beside the largest stage: a CPU is slow enough that reading
    them again costs nothing. The plan of a workload that does not fit says so in `problem`.
    """
    cuda = hardware.device == "cuda"
    dtype = dtype or (("bfloat16" if hardware.bfloat16 else "float16") if cuda else "float32")
    limit = _limit(hardware, max_vram if cuda else max_ram)
    usable = limit - (max(RESERVE_BYTES, int(RESERVE_SHARE * limit)) if cuda else 0)
    vae = fit(workload, dtype, usable - _base(cuda), park=cuda)
    ring = RING_SLOTS * workload.block_bytes + _base(cuda)
    rows, parked = _passing(workload, dtype, usable - ring, cuda)
    waiting = parked_bytes(workload, dtype) if parked else 0
    stages = [
        _stage("text", workload.text_block_bytes, text_bytes(workload), cuda),
        _vae_stage("images", vae, cuda),
        _stage("denoise", workload.block_bytes, denoise_bytes(workload, dtype, rows, parked), cuda, waiting),
        _vae_stage("decode", vae, cuda),
    ]
    precision = precision or _precision(hardware, workload)
    plan = Plan(
        device=hardware.device,
        device_name=hardware.name,
        precision=precision,
        dtype=dtype,
        vae_dtype=vae.dtype,
        vae_tile=vae.tile,
        vae_room=vae.room,
        ring_slots=RING_SLOTS,
        resident_blocks=0,
        token_rows=rows,
        parked_tokens=parked,
        stages=tuple(stages),
        limit_bytes=limit,
    )
    if plan.peak_bytes > limit:
        return replace(plan, problem=_shortage(plan, limit))
    host = max(stage.host_bytes for stage in stages)
    host_limit = int(max_ram * GIB) if max_ram is not None else hardware.ram_free
    if cuda and host > host_limit:
        return replace(plan, problem=f"it needs {host / GIB:.1f} GiB of RAM, {host_limit / GIB:.1f} GiB may be used")
    if not cuda:
        return plan
    spare = usable - stages[2].device_bytes
    resident = min(workload.layers, max(0, spare) // max(1, workload.block_bytes))
    kept = StagePlan("denoise", stages[2].device_bytes + resident * workload.block_bytes, stages[2].host_bytes)
    return replace(plan, resident_blocks=resident, stages=(*stages[:2], kept, stages[3]))


def _precision(hardware: Hardware, workload: Workload) -> str:
    gains = hardware.fast_gain >= WORTH_GAIN and workload.weight_type not in EXACT_TYPES
    return "fast" if gains else "exact"


def _passing(workload: Workload, dtype: str, usable: int, cuda: bool) -> tuple[int | None, bool]:
    """How many tokens pass at a time, and whether they wait on the host: the quickest way that fits.

    Every part decodes the weights again, which shows below _GOOD_ROWS; parking shows less than that.
    """
    rows = [-(-workload.tokens // parts) for parts in (2, 4, 8, 16, 32, 64, 128)]
    good = [count for count in rows if count >= _GOOD_ROWS]
    few = [count for count in rows if _FEWEST_ROWS <= count < _GOOD_ROWS]
    ways: list[tuple[int | None, bool]] = [(None, False), *((count, False) for count in good)]
    ways += [(count, True) for count in good + few] if cuda else [(count, False) for count in few]
    return next((way for way in ways if denoise_bytes(workload, dtype, *way) <= usable), ways[-1])


def _limit(hardware: Hardware, gib: float | None) -> int:
    free = hardware.vram_free + CONTEXT_BYTES if hardware.device == "cuda" else hardware.ram_free
    return free if gib is None else min(int(gib * GIB), free)


def _base(cuda: bool) -> int:
    return CONTEXT_BYTES if cuda else PROCESS_BYTES


def _stage(name: str, block_bytes: int, working_bytes: int, cuda: bool, waiting: int = 0) -> StagePlan:
    total = RING_SLOTS * block_bytes + working_bytes + _base(cuda)
    if cuda:
        return StagePlan(name, total, staging_bytes(block_bytes) + PROCESS_BYTES + waiting)
    return StagePlan(name, 0, total)


def _vae_stage(name: str, vae: Autoencoder, cuda: bool) -> StagePlan:
    stage = _stage(name, 0, vae.working_bytes, cuda)
    return replace(stage, host_bytes=stage.host_bytes + vae.parked_bytes)


def _shortage(plan: Plan, limit: int) -> str:
    worst = max(plan.stages, key=lambda stage: stage.device_bytes if plan.device == "cuda" else stage.host_bytes)
    memory = "VRAM" if plan.device == "cuda" else "RAM"
    return f"{worst.name} needs {plan.peak_bytes / GIB:.1f} GiB of {memory}, {limit / GIB:.1f} GiB may be used"
