"""Fit the VAE into memory: choose its dtype, its tile, and how much of its cache waits on the host."""

from dataclasses import dataclass

from skyrun.presets.memory import vae_bytes, vae_copy_bytes, vae_memory_bytes
from skyrun.presets.workload import Workload

SLABS = (2, 4, 8)  # parts that a frame is cut into; with more, buffers of whole frames outweigh what tiles save


@dataclass(frozen=True)
class Autoencoder:
    """How the VAE runs: a part of the plan.

    tile: height and width in pixels that a convolution works on at a time; None stands for whole frames.
    room: bytes of device memory for the cache of earlier frames; None if all of the cache stays on the device.
    working_bytes: device memory that the VAE takes. parked_bytes: host memory that the rest of the cache takes.
    """

    dtype: str
    tile: tuple[int, int] | None
    room: int | None
    working_bytes: int
    parked_bytes: int


def fit(workload: Workload, dtype: str, usable: int, park: bool, exact: bool = True) -> Autoencoder:
    """The best setting that takes at most `usable` bytes of the device; if none does, the one that takes least.

    float32 on whole frames is best, then `dtype` on the largest tile that fits. Tiles cost almost no time. If even the
    smallest tile does not fit, a part of the cache waits on the host and is copied for every group of frames.

    Args:
        workload: the clip.
        dtype: the 16-bit dtype to use if float32 does not fit.
        usable: bytes of the device that may be used.
        park: whether the host has memory of its own, that is, whether the device is a GPU.
        exact: whether float32, which is slower, may be chosen.
    """
    slabs = [(-(-workload.height // count), workload.width) for count in SLABS]
    for kind, tile in [(("float32" if exact else dtype), None), (dtype, None), *((dtype, slab) for slab in slabs)]:
        needed = _needed(workload, kind, tile)
        if needed <= usable:
            return Autoencoder(kind, tile, None, needed, 0)
    memory, needed = vae_memory_bytes(workload, dtype), _needed(workload, dtype, slabs[-1])
    if not park:
        return Autoencoder(dtype, slabs[-1], None, needed, 0)
    parked = min(memory, needed - usable)
    return Autoencoder(dtype, slabs[-1], memory - parked, needed - parked, parked)


def _needed(workload: Workload, dtype: str, tile: tuple[int, int] | None) -> int:
    return vae_bytes(workload, dtype, tile) + vae_copy_bytes(workload, dtype, tile)
