"""A measurement, the clock that takes it, and a description of the environment."""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import torch

from skyrun.kernels.machine.choice import holds_for
from skyrun.kernels.machine.device import median_seconds
from skyrun.kernels.machine.failures import is_out_of_memory
from skyrun.presets.machine.nvidia_smi import query

_LEAST, _MOST = 5, 50  # launches of a measurement; on a CPU one may be enough
_TARGET = 0.5  # seconds that a measurement should take, within these bounds
_FLUSH_BYTES = 256 << 20  # larger than any cache; written between launches, so that each begins with a cold cache


@dataclass(frozen=True)
class Measurement:
    """Seconds that a backend (`way`) takes for a piece of work; None where it did not fit in memory.

    part: "copy", "decode", "linear", "attention" or "block". what: the type or shape. rows: of activations, 0 if there
    are none. nbytes: least bytes read and written. operations: multiplications and additions.
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
            launches = int(min(_MOST, max(least, _TARGET / max(once, 1e-6))))
            if launches == 1:
                return once
            return median_seconds(self._device, work, launches, self._flush.zero_)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None


def environment(device: torch.device) -> dict[str, str]:
    """What measurements depend on: device, clocks, driver, versions, date."""
    found = {"date": str(date.today()), **holds_for(device), "python": platform.python_version()}
    if device.type == "cuda":
        found["driver"] = query("driver_version")
        found["clocks"] = query("clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu")
    else:
        found["device"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {name: value for name, value in found.items() if value and value != "None"}
