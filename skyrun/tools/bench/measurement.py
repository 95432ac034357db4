"""One measured figure, and how figures are taken."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from skyrun.kernels.device import median_seconds

_LEAST, _MOST = 5, 50  # launches of a measurement; on a CPU one may be enough
_WORTH = 0.5  # seconds that one takes, as far as these bounds allow
_FLUSH_BYTES = 256 << 20  # larger than any cache: written between launches, so that nothing is found there


@dataclass(frozen=True)
class Measurement:
    """Seconds of one way to do a piece of work; None where it did not fit in memory.

    part: "copy", "decode", "linear", "attention" or "block". what: the type or shape. rows: of activations, 0 if there
    are none. nbytes: read and written at least. operations: multiplications and additions.
    """

    part: str
    what: str
    rows: int
    way: str
    seconds: float | None
    nbytes: int = 0
    operations: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values, with rates in GB/s and TFLOP/s."""
        values = asdict(self)
        if self.seconds and self.nbytes:
            values["gb_per_second"] = self.nbytes / self.seconds / 1e9
        if self.seconds and self.operations:
            values["tflop_per_second"] = self.operations / self.seconds / 1e12
        return values


class Clock:
    """Takes times on one device, each launch with a cold cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(_FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def seconds(self, work: Callable[[], object]) -> float | None:
        """The median time of `work`; None if there is not enough memory for it."""
        try:
            once = median_seconds(self._device, work, 1)
            least = _LEAST if self._device.type == "cuda" else 1
            launches = int(min(_MOST, max(least, _WORTH / max(once, 1e-6))))
            if launches == 1:
                return once
            return median_seconds(self._device, work, launches, self._flush.zero_)
        except torch.OutOfMemoryError:
            return None
