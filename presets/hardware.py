"""What the machine has: each number as it was measured, as the system reports it, as it was stated, or as assumed."""

import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from skyrun.presets.card import Card, Rates, link_rate
from skyrun.presets.card_table import AMPERE, B200, GA100, HOPPER, VOLTA
from skyrun.presets.cards import find_card
from skyrun.presets.host import ASSUMED_DISK_RATE, cpu_name, disk_rate, free_space, memory, where
from skyrun.presets.memory import CONTEXT_BYTES, GIB
from skyrun.presets.nvidia_smi import query

MEASURED, REPORTED, ASSUMED, STATED = "measured", "reported", "assumed", "stated"
_CORE_RATE = 25e9  # operations per second of a core, float32
_CORE_DECODE = 0.4e9  # bytes per second that a core decodes blocks from and to
_COPY_BYTES = 64 << 20
_LINK_SECONDS = 0.1
_KINDS = {kind.capability: kind for kind in (VOLTA, GA100, HOPPER, B200)}  # that are not as GeForce cards are
_DESKTOP_VRAM, _DESKTOP_RAM = 0.8, 3.0  # GiB that the system and a desktop use


@dataclass(frozen=True)
class Hardware:
    """The machine that a plan is for. device: "cuda" or "cpu". Sizes in bytes; VRAM is 0 without a GPU.

    fast_gain: how many times quicker linear layers are in int8, as measured; 0 where they are not or were not.
    disk_rate, link_rate: bytes per second from the disk that holds the model, and to the GPU. rates: of computing, None
    if nothing is known. system: "Linux", "WSL" or "Windows". origins: where numbers come from, by field: "measured",
    "reported", "stated" or "assumed"; those that are missing are assumed.
    """

    device: str
    name: str
    vram_total: int
    vram_free: int
    ram_total: int
    ram_free: int
    bfloat16: bool = True
    fast_gain: float = 0.0
    disk_rate: float = ASSUMED_DISK_RATE
    disk_free: int = 0
    link_rate: float = 12e9
    rates: Rates | None = None
    capability: tuple[int, int] = (0, 0)
    driver: str = ""
    cpu: str = ""
    system: str = ""
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    def origin(self, name: str) -> str:
        """Where a number comes from."""
        return self.origins.get(name, ASSUMED)

    def knowing(self, origin: str, **values: Any) -> "Hardware":
        """The same machine with other numbers, and where they come from."""
        return replace(self, **values, origins=self.origins | dict.fromkeys(values, origin))


def cpu_rates(cores: int) -> Rates:
    """What a CPU is expected to do; `skyrun tune` measures it."""
    rate = cores * _CORE_RATE
    return Rates(rate, rate, 0.0, 0.0, rate / 2, cores * _CORE_DECODE)


def probe(device: str, model: Path | None = None, measure: bool = True) -> Hardware:
    """Look at this machine. Imports torch only for a GPU.

    model: a file, or the folder it is to be in, on the disk that counts. measure: its rate if the file is large enough
    for that, and the link to the GPU, in less than a second.
    """
    import psutil

    total, free = memory()
    found = Hardware("cpu", f"CPU with {psutil.cpu_count()} threads", 0, 0, total, free, system=where())
    found = found.knowing(REPORTED, ram_total=total, ram_free=free, cpu=cpu_name(), system=where())
    found = found.knowing(ASSUMED, rates=cpu_rates(psutil.cpu_count(logical=False) or 1))
    if device == "cuda":
        found = _with_gpu(found, measure and model is not None)
    return found if model is None else _with_disk(found, model, measure)


def _with_gpu(found: Hardware, measure: bool) -> Hardware:
    import torch

    free, total = torch.cuda.mem_get_info()
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    found = replace(found, device="cuda", bfloat16=capability >= (8, 0))
    found = found.knowing(REPORTED, name=name, vram_total=total, vram_free=free, capability=capability)
    card = find_card(name, total / GIB) or unknown_card(
        name, capability, total, torch.cuda.get_device_properties(0).multi_processor_count
    )
    found = found.knowing(ASSUMED, rates=card.rates, link_rate=card.link_rate)
    said = re.match(r"([\d.]+), (\d+), (\d+)", query("driver_version,pcie.link.gen.max,pcie.link.width.max"))
    if said:
        found = found.knowing(REPORTED, driver=said[1]).knowing(
            ASSUMED, link_rate=link_rate(int(said[2]), int(said[3]))
        )
    return found.knowing(MEASURED, link_rate=measure_link()) if measure else found


def unknown_card(name: str, capability: tuple[int, int], vram: int, processors: int) -> Card:
    """A card that is in no table: as quick for each of its multiprocessors as others of its kind, 1.7 GHz."""
    kind = _KINDS.get(capability, AMPERE)
    return Card(name, capability, vram >> 30, 15 * processors, (3, 8), *kind.peaks(processors, 1700))


def measure_link() -> float:
    """Bytes per second from page-locked memory to the GPU, copied for a tenth of a second."""
    import torch

    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    target.copy_(source)
    torch.cuda.synchronize()
    start, copies = time.perf_counter(), 0
    while time.perf_counter() - start < _LINK_SECONDS:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        copies += 1
    return copies * _COPY_BYTES / (time.perf_counter() - start)


def _with_disk(found: Hardware, model: Path, measure: bool) -> Hardware:
    folder = model if model.is_dir() else model.parent
    found = found.knowing(REPORTED, disk_free=free_space(folder))
    rate = disk_rate(model) if measure and model.is_file() else 0.0
    return found.knowing(MEASURED, disk_rate=rate) if rate else found


def stated(card: Card, ram: float, disk: float, vram: float | None = None) -> Hardware:
    """A machine that is not at hand: GiB of RAM and of VRAM, GB/s of its disk. A desktop takes some of both."""
    total = int((card.vram if vram is None else vram) * GIB)
    return Hardware(
        "cuda",
        f"{card.name} {card.vram if vram is None else vram:g} GB",
        total,
        max(0, total - int(_DESKTOP_VRAM * GIB) - CONTEXT_BYTES),
        int(ram * GIB),
        free_ram(ram),
        bfloat16=card.bfloat16,
        fast_gain=card.rates.fast_linear / card.rates.linear,
        disk_rate=disk * 1e9,
        link_rate=card.link_rate,
        rates=card.rates,
        capability=card.capability,
    )


def stated_cpu(ram: float, disk: float, cores: int = 8) -> Hardware:
    """A machine without a GPU: GiB of RAM, GB/s of its disk."""
    name, rates = f"CPU with {cores} cores", cpu_rates(cores)
    return Hardware("cpu", name, 0, 0, int(ram * GIB), free_ram(ram), disk_rate=disk * 1e9, rates=rates)


def free_ram(gib: float) -> int:
    """Bytes of so many GiB that are free while a desktop runs."""
    return max(0, int((gib - _DESKTOP_RAM) * GIB))
