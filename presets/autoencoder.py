"""Fit the VAE into memory: choose its tile, and how much of its cache waits on the host."""

from dataclasses import dataclass

from skyrun.presets.memory import PARKING_PIECE, PARKING_PIECES, vae_bytes, vae_copy_bytes, vae_memory_bytes
from skyrun.presets.workload import Workload

SLABS = (2, 4, 8)  # parts that a frame is cut into; with more, buffers of whole frames outweigh what tiles save
WAYS = ("encode", "decode")


@dataclass(frozen=True)
class Autoencoder:
    """How the VAE encodes or decodes: a part of the plan.

    dtype: of weights and activations. tile: height and width in pixels that a convolution works on at a time; None
    stands for whole frames. room: bytes of device memory for the cache of earlier frames, the rest of which waits on
    the host; None if all of it stays on the device. working_bytes: device memory that the VAE takes. parked_bytes: of
    the cache, that wait on the host.
    """

    dtype: str
    tile: tuple[int, int] | None
    room: int | None
    working_bytes: int
    parked_bytes: int = 0

    @property
    def host_bytes(self) -> int:
        """Host memory for what waits there, and for the buffers on its way."""
        return self.parked_bytes + PARKING_PIECES * PARKING_PIECE if self.parked_bytes else 0


def autoencoder(workload: Workload, way: str, usable: int, cuda: bool, bfloat16: bool) -> Autoencoder:
    """How the VAE encodes or decodes.

    Decoding in bfloat16 changes pixels by less than rounding to bytes does. Encoding in it would change more: errors of
    latents are carried into the whole clip. A GPU encodes few frames, so they are encoded in float32 wherever that
    fits. A CPU computes both in float32, in which it is quickest. float16 overflows: a decoder's activations can pass
    65504 (tests/test_vae.py).

    Args:
        workload: the clip.
        way: of WAYS.
        usable: bytes of the device that may be used.
        cuda: whether the device is a GPU.
        bfloat16: whether bfloat16 may be used.
    """
    best = fit(workload, way, "bfloat16" if bfloat16 and way == "decode" else "float32", usable, park=cuda)
    return best if best.working_bytes <= usable or not bfloat16 else fit(workload, way, "bfloat16", usable, park=cuda)


def fit(workload: Workload, way: str, dtype: str, usable: int, park: bool) -> Autoencoder:
    """The best setting that takes at most `usable` bytes of the device; if none does, the one that takes least.

    Whole frames are best, then the largest tile that fits. Tiles cost almost no time. If even the smallest tile does
    not fit, a part of the cache waits on the host and is copied for every group of frames.

    Args:
        workload: the clip.
        way: of WAYS.
        dtype: of weights and activations.
        usable: bytes of the device that may be used.
        park: whether the host has memory of its own, that is, whether the device is a GPU.
    """
    slabs = [(-(-workload.height // count), workload.width) for count in SLABS]
    for tile in (None, *slabs):
        needed = _needed(workload, way, dtype, tile)
        if needed <= usable:
            return Autoencoder(dtype, tile, None, needed)
    memory, needed = vae_memory_bytes(workload, way, dtype), _needed(workload, way, dtype, slabs[-1])
    parked = min(memory, needed - usable) if park else 0
    return Autoencoder(dtype, slabs[-1], memory - parked if parked else None, needed - parked, parked)


def _needed(workload: Workload, way: str, dtype: str, tile: tuple[int, int] | None) -> int:
    return vae_bytes(workload, way, dtype, tile) + vae_copy_bytes(workload, way, dtype, tile)
