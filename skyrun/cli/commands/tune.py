"""`skyrun tune`: measure this machine, keep it, and show what plans were made with before and are made with now."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from skyrun.cli.console import display, emit
from skyrun.cli.progress import progress
from skyrun.planning.hardware import save_tuned, this_machine
from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request
from skyrun.presets import Hardware
from skyrun.presets.cards import Rates
from skyrun.presets.timing import rates_of
from skyrun.streaming.device import choose_device
from skyrun.tasks import TASKS
from skyrun.tools.tune import STEPS, tune, tuned
from skyrun.units import duration, table

_NAMES = {
    "disk": "disk, GB/s",
    "link": "link to the GPU, GB/s",
    "decode": "decoding weights, GB/s",
    "linear": "linear layers, TFLOP/s",
    "attention": "attention, TFLOP/s",
    "fast_linear": "linear layers in int8, TOP/s",
    "fast_attention": "attention in int8, TOP/s",
    "convolution": "convolutions, TFLOP/s",
}
_CLIP = Request(next(iter(TASKS)), "")


def execute(arguments: Namespace) -> int:
    """Measure this machine, and show the outcome."""
    summary, text = _measure(arguments.device, arguments.model)
    if arguments.json:
        emit({"event": "result"} | summary)
    else:
        display(text)
    return 0


def _measure(device_name: str | None, model: Path | None) -> tuple[dict[str, Any], str]:
    """Measure and keep. Returns plain values and text: rates, and the time of a clip, before and after."""
    device = choose_device(device_name)
    before = this_machine(device.type, model)
    found: dict[str, float] = {}
    with progress() as shown:
        shown.begin("measuring", len(STEPS), "figures")
        for name, rate in tune(device, model):
            found[name] = rate
            shown.advance(1)
        shown.end()
    path = save_tuned(device.type, tuned(device, model, found))
    after = this_machine(device.type, model)
    summary: dict[str, Any] = {"file": str(path), "rates": {}, "seconds": {}}
    rows = [["", "before", "", "now"]]
    for name in STEPS:
        old, origin, new = _rate(before, name), _origin(before, name), _rate(after, name)
        if found[name]:
            unit = 1e9 if name in ("disk", "link", "decode") else 1e12
            rows.append([_NAMES[name], f"{old / unit:.3g}", origin, f"{new / unit:.3g}"])
            summary["rates"][name] = {"before": old, "origin": origin, "now": new}
    times = [plan_request(_CLIP, hardware).plan.seconds for hardware in (before, after)]
    summary["seconds"] = {"before": times[0], "now": times[1]}
    rows.append(["r2v, 5 s at 480P, as published", duration(times[0]), "", duration(times[1])])
    return summary, f"{table(rows)}\nkept in {path}: `skyrun plan` and `skyrun run` use it"


def _rate(hardware: Hardware, name: str) -> float:
    if name in Rates.__dataclass_fields__:
        return float(getattr(rates_of(hardware), name))
    return hardware.disk_rate if name == "disk" else hardware.link_rate


def _origin(hardware: Hardware, name: str) -> str:
    return hardware.origin("rates" if name in Rates.__dataclass_fields__ else f"{name}_rate")
