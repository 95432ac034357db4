"""How the autoencoder works in the memory there is: types, how much of a frame at a time, what waits on the host."""

from dataclasses import dataclass

from skyrun.presets.memory import vae_bytes, vae_copy_bytes, vae_memory_bytes
from skyrun.presets.workload import Workload

SLABS = (2, 4, 8)  # of a frame; with more of them, what stays whole outweighs what they save


@dataclass(frozen=True)
class Autoencoder:
    """A part of the plan.

    tile: height and width of what a convolution works on at a time, None: whole frames. room: bytes of the device for
    what is remembered of earlier frames, None: all of it. working_bytes: on the device, parked_bytes: on the host.
    """

    dtype: str
    tile: tuple[int, int] | None
    room: int | None
    working_bytes: int
    parked_bytes: int


def fit(workload: Workload, dtype: str, usable: int, park: bool, exact: bool = True) -> Autoencoder:
    """The best way that takes at most `usable` bytes of the device; where there is none, the one that takes least.

    float32 on whole frames is best (exact: if it may be that slow), then `dtype`, on the largest tile. Tiles cost next
    to nothing; what does not fit then waits on the host (park: there is another memory than the device's) and travels
    for every group of frames.
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
