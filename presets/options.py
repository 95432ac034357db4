"""The ways to make the steps of a clip, and which of them is taken."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from skyrun.presets.budget import Budget
from skyrun.presets.hardware import Hardware
from skyrun.presets.memory import denoise_bytes, parked_bytes
from skyrun.presets.timing import Time, denoise_time, step_time
from skyrun.presets.workload import Workload

EXACT_TYPES = ("F32", "F16", "BF16", "Q8_0")  # int8 products would add visibly to the error of these
POOR_TYPES = ("Q3_K", "Q2_K")  # visibly worse clips: taken where nothing better fits, or where they are asked for
PREFERENCES = ("quality", "speed", "memory")
WORTH_GAIN = 1.1  # times quicker than exact that int8 has to be
# Times as long as the quickest is as good as it: better weights are worth that. A plan may be so much slower than the
# one for speed without saying so, and that one than the quickest there is: 3 % in all.
NEARLY = 1.03**0.5
_FEWEST_ROWS = 512  # tokens at a time

Way = tuple[int | None, bool]  # how many tokens pass at a time, None: all; whether the others wait on the host


@dataclass(frozen=True)
class Option:
    """A file, a precision and a way to pass the tokens, with what a step and all of them take."""

    hardware: Hardware
    work: Workload
    precision: str
    way: Way
    resident: int
    device_bytes: int
    host_bytes: int
    fits: bool
    step: Time

    @cached_property
    def denoise(self) -> Time:
        """What all steps take."""
        return denoise_time(self.hardware, self.work, self.step)

    @property
    def memory(self) -> tuple[int, int]:
        """What it takes, the device first."""
        return self.device_bytes, self.host_bytes

    @property
    def order(self) -> tuple[float, int, bool, int]:
        """The quickest first, then what reads less."""
        rows, parked = self.way
        return self.step.seconds, -self.resident, parked, -(rows or self.work.tokens)

    @property
    def is_poor(self) -> bool:
        """Whether clips by this file look visibly worse."""
        return self.work.weight_type in POOR_TYPES


def options(
    hardware: Hardware, workload: Workload, budget: Budget, precision: str | None, dtype: str, keep: bool
) -> Iterator[Option]:
    """Every file with every way to pass the tokens.

    Args:
        hardware: the machine.
        workload: the clip and the files on offer.
        budget: what may be used; what takes more is among the options too, and says so.
        precision: "exact" or "fast", None: what suits the type of the file.
        dtype: of activations.
        keep: as many blocks stay in memory as fit then.
    """
    for work in workload.offers():
        how = precision or _precision(hardware, work)
        for way in _ways(work, budget.cuda):
            rows, parked = way
            working = denoise_bytes(work, dtype, rows, parked)
            device, host = budget.taken(work.block_bytes, working, parked_bytes(work, dtype) if parked else 0)
            spare = max(0, budget.usable - device) if budget.cuda and keep else 0
            resident = min(work.layers, spare // max(1, work.block_bytes))
            step = step_time(
                hardware, work, fast=how == "fast", dtype=dtype, rows=rows, parked=parked, resident=resident
            )
            fits, kept = budget.fits(device, host), resident * work.block_bytes
            yield Option(hardware, work, how, way, resident, device + kept, host, fits, step)


def _ways(workload: Workload, cuda: bool) -> list[Way]:
    counts = [-(-workload.tokens // parts) for parts in (2, 4, 8, 16, 32, 64, 128)]
    rows = [count for count in counts if count >= _FEWEST_ROWS]
    return [(None, False), *((count, parked) for parked in ((False, True) if cuda else (False,)) for count in rows)]


def _precision(hardware: Hardware, workload: Workload) -> str:
    gains = hardware.fast_gain >= WORTH_GAIN and workload.weight_type not in EXACT_TYPES
    return "fast" if gains else "exact"


def best(found: list[Option], prefer: str) -> Option:
    """By what is preferred. Files of poor types are only looked at where no other fits."""
    fitting = [option for option in found if option.fits]
    good = [option for option in fitting if not option.is_poor]
    if not fitting or prefer == "memory":
        return min(good or fitting or found, key=lambda option: (option.memory, option.order))
    good = good or _largest(fitting)
    return min(_quick(good) if prefer == "speed" else _hidden(good), key=lambda option: option.order)


def _quick(options: list[Option]) -> list[Option]:
    """Of the best file with which neither a step nor the clip takes noticeably longer than with the quickest."""
    quickest = min(options, key=lambda option: (option.denoise.seconds, option.order))
    step, clip = NEARLY * quickest.step.seconds, NEARLY * quickest.denoise.seconds
    return _largest([option for option in options if option.step.seconds <= step and option.denoise.seconds <= clip])


def _hidden(options: list[Option]) -> list[Option]:
    """Of the best file whose reading is hidden behind computing; of the smallest where that is so of none."""
    hidden = [option for option in options if option.step.is_hidden]
    return _largest(hidden) if hidden else _largest(options, smallest=True)


def _largest(options: list[Option], smallest: bool = False) -> list[Option]:
    size = (min if smallest else max)(option.work.block_bytes for option in options)
    return [option for option in options if option.work.block_bytes == size]
