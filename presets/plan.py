"""Decide once how a clip is made: numbers' type, what stays in memory, and how much each stage will take."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from skyrun.presets.hardware import Hardware
from skyrun.presets.memory import (
    CONTEXT_BYTES,
    GIB,
    PROCESS_BYTES,
    RESERVE_BYTES,
    RESERVE_SHARE,
    denoise_bytes,
    page_locked_bytes,
    text_bytes,
    vae_bytes,
)
from skyrun.presets.workload import Workload

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

    problem: why it will not fit; empty if it will.
    """

    device: str
    device_name: str
    dtype: str
    vae_dtype: str
    ring_slots: int
    resident_blocks: int
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
    vae_dtype = "float32" if vae_bytes(workload, "float32") + _base(cuda) <= usable else dtype
    stages = [
        _stage("text", workload.text_block_bytes, text_bytes(workload), cuda),
        _stage("images", 0, vae_bytes(workload, vae_dtype), cuda),
        _stage("denoise", workload.block_bytes, denoise_bytes(workload, dtype), cuda),
        _stage("decode", 0, vae_bytes(workload, vae_dtype), cuda),
    ]
    plan = Plan(hardware.device, hardware.name, dtype, vae_dtype, RING_SLOTS, 0, tuple(stages), limit)
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


def _limit(hardware: Hardware, gib: float | None) -> int:
    free = hardware.vram_free + CONTEXT_BYTES if hardware.device == "cuda" else hardware.ram_free
    return free if gib is None else min(int(gib * GIB), free)


def _base(cuda: bool) -> int:
    return CONTEXT_BYTES if cuda else PROCESS_BYTES


def _stage(name: str, block_bytes: int, working_bytes: int, cuda: bool) -> StagePlan:
    total = RING_SLOTS * block_bytes + working_bytes + _base(cuda)
    if cuda:
        return StagePlan(name, total, page_locked_bytes(block_bytes) + PROCESS_BYTES)
    return StagePlan(name, 0, total)


def _shortage(plan: Plan, limit: int) -> str:
    worst = max(plan.stages, key=lambda stage: stage.device_bytes if plan.device == "cuda" else stage.host_bytes)
    memory = "VRAM" if plan.device == "cuda" else "RAM"
    return f"{worst.name} needs {plan.peak_bytes / GIB:.1f} GiB of {memory}, {limit / GIB:.1f} GiB may be used"
