"""What the VAE remembers between groups of frames: the last input frames of each convolution over time."""

import torch
from torch import Tensor

from skyrun.streaming.staging import Parking

_HOST = torch.device("cpu")


class Memory:
    """The last input frames of each layer, by layer and slab. They are contiguous: [T, H, W, C].

    device: where the layers run. room: bytes of the device that the frames may take; the rest waits in ordinary memory
    of the host and travels through page-locked buffers. None stands for no limit.
    """

    def __init__(self, device: torch.device, room: int | None) -> None:
        self._device, self._room = device, room
        self._frames: dict[tuple[str, int], Tensor] = {}
        self._waiting: set[tuple[str, int]] = set()  # on the host
        self._parking: Parking | None = None
        self.first_group, self.last_group = True, False

    @property
    def parked_bytes(self) -> int:
        """Bytes of the frames that wait on the host."""
        return sum(self._frames[place].nbytes for place in self._waiting)

    def holds(self, layer: str, slab: int = 0) -> bool:
        """Whether there are frames of a layer."""
        return (layer, slab) in self._frames

    def recall(self, out: Tensor, layer: str, slab: int = 0) -> None:
        """Copy the frames of a layer to `out`."""
        frames = self._frames[layer, slab]
        if self._parking is not None and (layer, slab) in self._waiting:
            self._parking.fetch(_bytes(frames), _bytes(out))
        else:
            out.copy_(frames)

    def keep(self, frames: Tensor, layer: str, slab: int = 0) -> None:
        """Keep frames for the next group, if there is one. Where they are kept is decided once."""
        if self.last_group:
            return
        if not self.holds(layer, slab):
            self._frames[layer, slab] = torch.empty(
                frames.shape, dtype=frames.dtype, device=self._place(frames, layer, slab)
            )
        if self._parking is not None and (layer, slab) in self._waiting:
            self._parking.store(_bytes(frames.contiguous()), _bytes(self._frames[layer, slab]))
        else:
            self._frames[layer, slab].copy_(frames)

    def _place(self, frames: Tensor, layer: str, slab: int) -> torch.device:
        if self._room is None:
            return frames.device
        if frames.nbytes <= self._room:
            self._room -= frames.nbytes
            return frames.device
        self._waiting.add((layer, slab))
        if self._parking is None and self._device.type == "cuda":
            self._parking = Parking(self._device)
        return _HOST

    def close(self) -> None:
        """Let go of the frames."""
        self._frames.clear()
        self._waiting.clear()
        if self._parking is not None:
            self._parking.close()
            self._parking = None


def _bytes(frames: Tensor) -> Tensor:
    return frames.view(torch.uint8).flatten()
