"""What the machine has."""

from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Hardware:
    """The machine that a plan is for. device: "cuda" or "cpu". Sizes in bytes; VRAM is 0 without a GPU.

    fast_gain: how many times quicker linear layers are in int8, as measured; 0 where they are not or were not.
    """

    device: str
    name: str
    vram_total: int
    vram_free: int
    ram_total: int
    ram_free: int
    bfloat16: bool = True
    fast_gain: float = 0.0


def probe(device: str) -> Hardware:
    """Look at this machine. Imports torch only for a GPU."""
    memory = psutil.virtual_memory()
    if device != "cuda":
        return Hardware("cpu", f"CPU with {psutil.cpu_count()} threads", 0, 0, memory.total, memory.available)
    import torch

    free, total = torch.cuda.mem_get_info()
    return Hardware(
        "cuda",
        torch.cuda.get_device_name(),
        total,
        free,
        memory.total,
        memory.available,
        bfloat16=torch.cuda.get_device_capability() >= (8, 0),
    )
