"""What a plan's times rest on, in sentences: rates with their origin, and what is taken for granted."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from skyrun.presets.machine.hardware import ASSUMED, DESKTOP_RAM, DESKTOP_VRAM, MEASURED, STATED, Hardware
from skyrun.presets.timing import (
    FEW_KEYS,
    START_SECONDS,
    WRITTEN_PIXELS,
    is_cached,
    planned_sending,
    rates_of,
)
from skyrun.presets.workload import Workload

if TYPE_CHECKING:
    from skyrun.presets.plan import Plan


def assumptions(hardware: Hardware, workload: Workload, plan: "Plan") -> Iterator[str]:
    """The sentences, those that matter most first.

    Args:
        hardware: the machine that the plan is for.
        workload: the clip with the file that the plan has chosen.
        plan: says which rates count.
    """
    rates, cuda = rates_of(hardware), hardware.device == "cuda"
    single = cuda and rates.float32 and "float32" in (plan.encoding.dtype, plan.decoding.dtype)
    slow = f" and {_tera(rates.float32)} in float32" if single else ""
    linear, attention = rates.linear, rates.attention_in(plan.attention) or rates.attention
    if plan.precision == "fast" and rates.fast_linear:
        linear = rates.fast_linear
    few = FEW_KEYS.get(plan.attention, "")
    to_text = f" ({_tera(rates.attention_in(few))} {_kind(few)} to the text)" if few and rates.attention_in(few) else ""
    origin = hardware.origin("rates")
    where = "from the table of cards" if origin == ASSUMED and cuda else "from the number of cores"
    yield (
        f"rates ({where if origin == ASSUMED else origin}): linear layers {_tera(linear)} {_kind(plan.precision)}, "
        f"attention {_tera(attention)} {_kind(plan.attention)}{to_text}, autoencoder {_tera(rates.convolution)}{slow}, "
        f"decoding and elementwise work {rates.decode / 1e9:.0f} GB/s"
    )
    for one in plan.beside:
        if one.attention == plan.asked and plan.sparse:
            origin = MEASURED if one.density_measured else ASSUMED
            yield f"attention reads {one.density:.0%} of its tiles ({origin}), and all in the first step of a window"
    yield f"the disk reads {hardware.disk_rate / 1e9:.2f} GB/s ({hardware.origin('disk_rate')})" + (
        f", the link to the card carries {hardware.link_rate / 1e9:.0f} GB/s ({hardware.origin('link_rate')})"
        if cuda
        else ""
    )
    if workload.devices > 1:
        yield (
            f"{workload.devices} devices of that kind read from one disk, and send each other "
            f"{hardware.peer_rate / 1e9:.1f} GB/s ({hardware.origin('peer_rate')}) while they receive as many: "
            f"{planned_sending(workload, plan) / 1e9:.3g} GB a step each"
        )
    if is_cached(hardware, workload):
        yield "after the first step the file of the transformer comes from the page cache"
    else:
        yield "the file of the transformer does not fit into free RAM and is read anew for each step"
    yield "the prompt has the longest text that the model reads and was not encoded before"
    if cuda:
        yield "the kernels were compiled by an earlier run; a first one compiles them while the text is encoded"
    yield (
        f"Python, torch{' and CUDA' * cuda} start in {START_SECONDS[hardware.device]:.0f} s; "
        f"{WRITTEN_PIXELS / 1e6:.0f} million pixels a second become video"
    )
    sizes = {"vram_free": f"{DESKTOP_VRAM:g} GiB of VRAM", "ram_free": f"{DESKTOP_RAM:g} GiB of RAM"}
    taken = [text for name, text in sizes.items() if hardware.origin(name) in (ASSUMED, STATED)]
    if taken := taken if cuda else taken[1:]:
        yield f"a desktop takes {' and '.join(taken)}"


def _tera(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s"


def _kind(precision: str) -> str:
    return {"fast": "in int8"}.get(precision, "exact" if precision == "exact" else f"in {precision}")
