"""List the options for the denoising steps of a clip, and choose one."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from skyrun.kernels.machine.capability import FLOAT8
from skyrun.presets.attention import ATTENTION_ERRORS, USUAL_DENSITY
from skyrun.presets.budget import Budget
from skyrun.presets.machine.hardware import Hardware
from skyrun.presets.memory import (
    GUIDED_FRAGMENTS,
    PARKING_PIECE,
    PARKING_PIECES,
    QUERY_TILE,
    denoise_bytes,
    parked_bytes,
    way_of,
    without_reserve,
)
from skyrun.presets.timing import Time, denoise_time, rates_of, step_time
from skyrun.presets.workload import Workload

EXACT_TYPES = ("F32", "F16", "BF16", "Q8_0")  # int8 matmuls would visibly add to the small error of these types
POOR_TYPES = ("Q3_K", "Q2_K")  # clips look visibly worse: chosen only if nothing better fits or the user asks
_ALLOWED_ERROR, _ALLOWED_ERROR_FOR_QUALITY = 0.025, 0.02  # of attention, where none is asked for
PREFERENCES = ("balanced", "quality", "speed", "memory")
WORTH_GAIN = 1.1  # times faster than exact matmuls that int8 must be
# An option that takes at most NEARLY times as long as the fastest counts as equally fast, and better weights win. The
# plan for speed may be that much slower than the fastest option, and another plan that much slower than the plan for
# speed without a note: 3 % in all.
NEARLY = 1.03**0.5
SKIPPING_GAIN = (
    0.85  # of the time of the dense plan that one which skips may take, to be chosen where none is asked for
)
_FEWEST_ROWS = 512  # tokens of a chunk

# How many tokens pass through a block at a time, None: all; and whether the others wait on the host.
Chunking = tuple[int | None, bool]


@dataclass(frozen=True)
class Option:
    """A transformer file with a precision and a chunking of the tokens, and the memory and time that it takes.

    work: the workload with this file. precision: "exact" or "fast". attention: of ATTENTIONS. bound: the error that
    skipping may cost; None skips nothing. resident: how many blocks stay on the device. fits: whether it stays within
    the budget. timed: the time of a denoising step, as `timing.step_time`, which takes longer where it `learns`.
    """

    hardware: Hardware
    work: Workload
    precision: str
    attention: str
    bound: float | None
    chunking: Chunking
    resident: int
    device_bytes: int
    host_bytes: int
    fits: bool
    timed: Callable[..., Time]

    @cached_property
    def step(self) -> Time:
        """The time of a denoising step."""
        return self.timed()

    @cached_property
    def first(self) -> Time:
        """The time of a window's first step, with all blocks at hand."""
        return self.timed(learns=True) if self.bound else self.step

    @cached_property
    def denoise(self) -> Time:
        """The time of all steps."""
        return denoise_time(self.hardware, self.work, self.step, self.first)

    @property
    def memory(self) -> tuple[int, int]:
        """(device, host) bytes, to compare options by memory."""
        return self.device_bytes, self.host_bytes

    @property
    def order(self) -> tuple[float, int, bool, int]:
        """A sort key: the fastest option first; among equals the one that reads and copies less."""
        rows, parked = self.chunking
        return self.step.seconds, -self.resident, parked, -(rows or self.work.own_tokens)

    @property
    def is_poor(self) -> bool:
        """Whether clips made with this file look visibly worse."""
        return self.work.weight_type in POOR_TYPES


def options(
    hardware: Hardware,
    workload: Workload,
    budget: Budget,
    precision: str | None,
    attention: str,
    bound: float | None,
    dtype: str,
    keep: bool,
) -> Iterator[Option]:
    """Every candidate file with every chunking of the tokens.

    Args:
        hardware: the machine.
        workload: the clip and the candidate files.
        budget: the memory that may be used; options that exceed it are listed too, with `fits` False.
        precision: "exact" or "fast"; None chooses what suits the type of each file.
        attention: of ATTENTIONS.
        bound: the error that skipping may cost; None skips nothing.
        dtype: of activations.
        keep: whether as many blocks stay on the GPU as fit.
    """
    for work in workload.offers():
        how = precision or _precision(hardware, work)
        way = way_of(budget.cuda, hardware.capability, dtype, how == "fast")
        skips = bool(bound)
        for chunking in _chunkings(work, budget.cuda):
            rows, parked = chunking
            working = denoise_bytes(work, dtype, rows, parked, way, attention, skips)
            device, host = budget.taken(
                work.block_bytes, working, parked_bytes(work, dtype) + PARKING_PIECES * PARKING_PIECE if parked else 0
            )
            spare = max(0, without_reserve(budget.limit, way) - device) if budget.cuda and keep else 0
            resident = min(work.layers, spare // max(1, work.block_bytes))
            timed = partial(
                step_time,
                hardware,
                work,
                fast=how == "fast",
                attention=attention,
                dtype=dtype,
                rows=rows,
                parked=parked,
                resident=resident,
                density=density_of(work) if skips else None,
            )
            holes = int(GUIDED_FRAGMENTS * working) if work.contexts > 1 and budget.cuda else 0
            fits, kept = budget.fits(device + holes, host), resident * work.block_bytes
            yield Option(hardware, work, how, attention, bound, chunking, resident, device + kept, host, fits, timed)


def density_of(workload: Workload) -> float:
    """The share of its tiles that attention is expected to read, where it skips some."""
    return workload.density or USUAL_DENSITY


def _chunkings(workload: Workload, cuda: bool) -> list[Chunking]:
    """Parts are whole tiles of queries, so that lists of keys do not depend on them."""
    tiles = -(-workload.own_tokens // QUERY_TILE)
    counts = [-(-tiles // parts) * QUERY_TILE for parts in (2, 4, 8, 16, 32, 64, 128)]
    rows = [count for count in counts if count >= _FEWEST_ROWS]
    return [(None, False), *((count, parked) for parked in ((False, True) if cuda else (False,)) for count in rows)]


def _precision(hardware: Hardware, workload: Workload) -> str:
    gains = hardware.fast_gain >= WORTH_GAIN and workload.weight_type not in EXACT_TYPES
    return "fast" if gains else "exact"


def usual_attention(hardware: Hardware, precision: str | None, prefer: str) -> str:
    """The precision of attention if none is asked for; exact if all is to be exact.

    It is the quickest one whose error is allowed; a less accurate one must be noticeably quicker than the one before.
    Where memory is preferred, it is the least accurate of these that has a kernel, which takes the least.
    """
    if precision == "exact":
        return "exact"
    rates, chosen = rates_of(hardware), "exact"
    limit = _ALLOWED_ERROR_FOR_QUALITY if prefer == "quality" else _ALLOWED_ERROR
    for name, error in ATTENTION_ERRORS.items():
        rate = rates.attention_in(name)
        if error < limit and (rate >= WORTH_GAIN * rates.attention_in(chosen) or (prefer == "memory" and rate > 0)):
            chosen = name
    return chosen


def gains_by_skipping(hardware: Hardware, dtype: str) -> bool:
    """Whether there are kernels that skip tiles: without them all is computed, and then left out."""
    cuda = hardware.device == "cuda"
    return hardware.fast_gain > 0 and way_of(cuda, hardware.capability, dtype, True) != "plain" and dtype != "float32"


def lacks_float8(hardware: Hardware, attention: str | None) -> bool:
    """Whether attention is asked for in float8, which the card does not have. A CPU computes it by the torch twin."""
    return attention == "fp8" and hardware.device == "cuda" and hardware.capability < FLOAT8


def best(found: list[Option], prefer: str) -> Option:
    """The best option for a preference. Files of poor types are considered only if no other file fits."""
    fitting = [option for option in found if option.fits]
    good = [option for option in fitting if not option.is_poor]
    if not fitting or prefer == "memory":
        return min(good or fitting or found, key=lambda option: (option.memory, option.order))
    good = good or _largest(fitting)
    return min(_quick(good) if prefer == "speed" else _hidden(good), key=lambda option: option.order)


def _quick(options: list[Option]) -> list[Option]:
    """The options of the best file with which neither a step nor the clip is noticeably slower than the fastest."""
    quickest = min(options, key=lambda option: (option.denoise.seconds, option.order))
    step, clip = NEARLY * quickest.step.seconds, NEARLY * quickest.denoise.seconds
    return _largest([option for option in options if option.step.seconds <= step and option.denoise.seconds <= clip])


def _hidden(options: list[Option]) -> list[Option]:
    """The options of the best file whose reading is hidden behind computing, or of the smallest file if none is.

    Passing few tokens at a time computes longer, which hides nothing.
    """
    computing: dict[int, float] = {}
    for option in options:
        nbytes = option.work.block_bytes
        computing[nbytes] = min(option.step.compute, computing.get(nbytes, math.inf))
    hidden = [option for option in options if option.step.is_hidden_by(computing[option.work.block_bytes])]
    return _largest(hidden) if hidden else _largest(options, smallest=True)


def _largest(options: list[Option], smallest: bool = False) -> list[Option]:
    size = (min if smallest else max)(option.work.block_bytes for option in options)
    return [option for option in options if option.work.block_bytes == size]
