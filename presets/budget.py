"""How much memory a plan may use, and how much a stage takes."""

from dataclasses import dataclass

from skyrun.presets.machine.hardware import Hardware
from skyrun.presets.memory import (
    ALLOCATOR_BYTES,
    CONTEXT_BYTES,
    FRAGMENTS,
    GIB,
    NCCL_BYTES,
    PROCESS_BYTES,
    RING_SLOTS,
    staging_bytes,
    without_reserve,
)


@dataclass(frozen=True)
class Budget:
    """Memory that a plan may use, in bytes.

    cuda: whether the device is a GPU. limit: bytes of the device that may be used. usable: what the VAE may take.
    host: bytes of host memory that may be used. base: bytes that are in use before the first tensor. fragments: share
    of activations that free memory which cannot be joined takes on top.
    """

    cuda: bool
    limit: int
    usable: int
    host: int
    base: int
    fragments: float = 0.0

    def fits(self, device_bytes: int, host_bytes: int) -> bool:
        """Whether a stage that takes this much memory may run."""
        if self.cuda:
            return device_bytes <= self.limit and host_bytes <= self.host
        return host_bytes <= self.limit

    def taken(self, block_bytes: int, working_bytes: int, waiting: int = 0) -> tuple[int, int]:
        """Bytes of the device and of the host that a stage takes.

        Args:
            block_bytes: the largest block of weights that is streamed; RING_SLOTS of them are in memory at a time.
            working_bytes: activations and other buffers of the stage.
            waiting: activations that wait on the host.
        """
        total = RING_SLOTS * block_bytes + working_bytes + self.base
        if not self.cuda:
            return 0, total
        total += ALLOCATOR_BYTES + int(self.fragments * working_bytes)
        return total, staging_bytes(block_bytes) + PROCESS_BYTES + waiting

    def working(self, nbytes: int) -> int:
        """What activations may take of `nbytes` of the device."""
        return int((nbytes - self.base) / (1 + self.fragments))


def budget_of(hardware: Hardware, max_vram: float | None, max_ram: float | None, devices: int = 1) -> Budget:
    """The free memory, or less if a limit in GiB is given: that of one device among several.

    Several have processes of their own, beside the one that has started them.
    """
    several = devices > 1
    host = (hardware.ram_free - several * PROCESS_BYTES) // devices
    host = host if max_ram is None else min(int(max_ram * GIB), host)
    if hardware.device != "cuda":
        return Budget(False, host, host, host, PROCESS_BYTES)
    free = hardware.vram_free + (not several) * CONTEXT_BYTES  # which the starting process keeps
    limit = free if max_vram is None else min(int(max_vram * GIB), free)
    base = CONTEXT_BYTES + several * NCCL_BYTES
    fragments = FRAGMENTS if hardware.system == "Windows" else 0.0
    return Budget(True, limit, without_reserve(limit, "vae"), host, base, fragments)
