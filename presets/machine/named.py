"""Named presets: typical machines that plans can be made for."""

from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import Hardware, stated, stated_cpu
from skyrun.presets.memory import CONTEXT_BYTES, GIB

# Card, GiB of VRAM, GiB of RAM. Disks are as fast as a SATA SSD.
_MACHINES = {
    "6gb": ("RTX 3060 Laptop", 6, 16),
    "8gb": ("RTX 4060", 8, 16),
    "12gb": ("RTX 3060", 12, 16),
    "16gb": ("RTX 4060 Ti", 16, 32),
    "24gb": ("RTX 3090", 24, 32),
    "cpu": ("", 0, 32),
}
PRESETS = tuple(_MACHINES)
_DISK = 0.5  # GB/s


def preset(name: str) -> Hardware:
    """The machine that a preset is for."""
    card_name, vram, ram = _MACHINES[name]
    card = find_card(card_name, vram)
    return stated(card, ram, _DISK) if card else stated_cpu(ram, _DISK)


def preset_limits(name: str) -> dict[str, float]:
    """The preset's free memory in GiB, as max_ram and max_vram for a plan on another machine."""
    machine = preset(name)
    limits = {"max_ram": machine.ram_free / GIB}
    return limits | ({"max_vram": (machine.vram_free + CONTEXT_BYTES) / GIB} if machine.device == "cuda" else {})
