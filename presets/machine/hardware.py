"""What the machine has, and where each value comes from: measured, reported by the system, stated, or assumed."""

import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from skyrun.kernels.machine.capability import OLDEST
from skyrun.presets.machine.card import Card, Rates, link_rate
from skyrun.presets.machine.card_table import AMPERE, B200, GA100, HOPPER, VOLTA
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.host import ASSUMED_DISK_RATE, cpu_name, disk_rate, free_space, memory, where
from skyrun.presets.machine.nvidia_smi import query
from skyrun.presets.memory import CONTEXT_BYTES, GIB

MEASURED, REPORTED, ASSUMED, STATED = "measured", "reported", "assumed", "stated"
_CORE_RATE = 25e9  # operations per second of a core, float32
_CORE_DECODE = 0.4e9  # bytes per second that a core reads and writes when it decodes blocks
_LOOPBACK_RATE = 1e9  # bytes per second between processes of a CPU
_THROUGH_HOST = 0.45  # of the link's rate reaches another card: through the host, as GeForce cards have no other way
_COPY_BYTES = 64 << 20
_LINK_SECONDS = 0.1
_KINDS = {kind.capability: kind for kind in (VOLTA, GA100, HOPPER, B200)}  # chips with other rates than GeForce cards
DESKTOP_VRAM, DESKTOP_RAM = 0.8, 3.0  # GiB that the operating system and a desktop use


@dataclass(frozen=True)
class Hardware:
    """The machine that a plan is for. Sizes are in bytes.

    device: "cuda" or "cpu". vram_total, vram_free: 0 without a GPU. fast_gain: how many times faster linear layers are
    in int8; 0 if int8 is not available. disk_rate: bytes per second from the disk that
    holds the model. link_rate: bytes per second to the GPU. peer_rate: bytes per second that one of several devices
    sends to the others while it receives as many. rates: of computing; None if nothing is known.
    system: "Linux", "WSL" or "Windows". origins: where the values come from, by field: "measured", "reported", "stated"
    or "assumed"; fields that are missing are assumed.
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
    peer_rate: float = _LOOPBACK_RATE
    rates: Rates | None = None
    capability: tuple[int, int] = (0, 0)
    driver: str = ""
    cpu: str = ""
    system: str = ""
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    def origin(self, name: str) -> str:
        """Where the value of a field comes from."""
        return self.origins.get(name, ASSUMED)

    def knowing(self, origin: str, **values: Any) -> "Hardware":
        """The same machine with other values of some fields, which come from `origin`."""
        return replace(self, **values, origins=self.origins | dict.fromkeys(values, origin))

    def linked(self, origin: str, rate: float) -> "Hardware":
        """The same machine with another rate of the link to its GPU, through which other GPUs are reached too."""
        return self.knowing(origin, link_rate=rate).knowing(ASSUMED, peer_rate=_THROUGH_HOST * rate)


def cpu_rates(cores: int) -> Rates:
    """The rates that a CPU is expected to reach. `skyrun tune` measures them."""
    rate = cores * _CORE_RATE
    return Rates(rate, rate, 0.0, 0.0, rate / 2, cores * _CORE_DECODE)


def probe(device: str, model: Path | None = None, measure: bool = True) -> Hardware:
    """Examine this machine. Imports torch only for a GPU.

    Args:
        device: "cuda" or "cpu".
        model: a file of the model, or the folder where it will be; its disk is examined.
        measure: whether to measure the disk, if the file is large enough, and the link to the GPU. This takes less than
            a second.
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
    found = replace(found, device="cuda", bfloat16=capability >= OLDEST)
    found = found.knowing(REPORTED, name=name, vram_total=total, vram_free=free, capability=capability)
    card = find_card(name, total / GIB) or unknown_card(
        name, capability, total, torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    )
    gain = card.rates.fast_linear / card.rates.linear
    found = found.knowing(ASSUMED, rates=card.rates, fast_gain=gain).linked(ASSUMED, card.link_rate)
    match = re.match(r"([\d.]+), (\d+), (\d+)", query("driver_version,pcie.link.gen.max,pcie.link.width.max"))
    if match:
        rate = link_rate(int(match[2]), int(match[3]))
        found = found.knowing(REPORTED, driver=match[1]).linked(ASSUMED, rate)
    return found.linked(MEASURED, measure_link()) if measure else found


def unknown_card(name: str, capability: tuple[int, int], vram: int, processors: int) -> Card:
    """A card for a GPU that the table does not list: rates per multiprocessor of its generation, at 1.7 GHz."""
    kind = _KINDS.get(capability, AMPERE)
    return Card(name, capability, vram >> 30, 15 * processors, (3, 8), *kind.peaks(processors, 1700))


def measure_link() -> float:
    """Measure for a tenth of a second how many bytes per second are copied from page-locked memory to the GPU."""
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
    """Another machine with a graphics card. Some of its RAM and VRAM is taken by a desktop.

    Args:
        card: its graphics card.
        ram: GiB of RAM.
        disk: GB/s that its disk delivers.
        vram: GiB of VRAM; by default what the card has.
    """
    total = int((card.vram if vram is None else vram) * GIB)
    return Hardware(
        "cuda",
        f"{card.name} {card.vram if vram is None else vram:g} GB",
        total,
        max(0, total - int(DESKTOP_VRAM * GIB) - CONTEXT_BYTES),
        int(ram * GIB),
        free_ram(ram),
        bfloat16=card.bfloat16,
        fast_gain=card.rates.fast_linear / card.rates.linear,
        disk_rate=disk * 1e9,
        link_rate=card.link_rate,
        peer_rate=_THROUGH_HOST * card.link_rate,
        rates=card.rates,
        capability=card.capability,
    )


def stated_cpu(ram: float, disk: float, cores: int = 8) -> Hardware:
    """Another machine, without a GPU.

    Args:
        ram: GiB of RAM.
        disk: GB/s that its disk delivers.
        cores: how many cores its CPU has.
    """
    name, rates = f"CPU with {cores} cores", cpu_rates(cores)
    return Hardware("cpu", name, 0, 0, int(ram * GIB), free_ram(ram), disk_rate=disk * 1e9, rates=rates)


def free_ram(gib: float) -> int:
    """How many bytes of `gib` GiB of RAM are free while a desktop runs."""
    return max(0, int((gib - DESKTOP_RAM) * GIB))
