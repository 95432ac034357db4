"""`skyrun tune`: measure this machine, save the rates, and show what they change."""

from argparse import Namespace

from skyrun.cli.console import display, emit
from skyrun.cli.progress import shown
from skyrun.engine.together import workers
from skyrun.tools.tune import Tuning, tune_machine
from skyrun.units import duration, table

_NAMES = {
    "disk": "disk, GB/s",
    "link": "link to the GPU, GB/s",
    "peer": "from device to device, GB/s",
    "decode": "decoding weights, GB/s",
    "linear": "linear layers, TFLOP/s",
    "attention": "attention, TFLOP/s",
    "fast_linear": "linear layers in int8, TOP/s",
    "int8_attention": "attention in int8, TOP/s",
    "full_int8_attention": "attention in full-int8, TOP/s",
    "fp8_attention": "attention in fp8, TOP/s",
    "convolution": "convolutions, TFLOP/s",
    "float32": "convolutions in float32, TFLOP/s",
}


def execute(arguments: Namespace) -> int:
    """Measure this machine, save the rates, and show the rates that plans used before and use now."""
    tuning = shown(tune_machine(arguments.device, workers, arguments.model), False)
    if arguments.json:
        emit({"event": "result"} | tuning.as_json())
    else:
        display(tuning_text(tuning))
    return 0


def tuning_text(tuning: Tuning) -> str:
    """The rates and the time of a clip, before and after tuning."""
    rows = [["", "before", "", "now"]]
    for name, title in _NAMES.items():
        if tuning.measured[name]:
            unit = 1e9 if "GB/s" in title else 1e12
            old, new = (f"{rate / unit:.3g}" for rate in (tuning.rate_before(name), tuning.rate_after(name)))
            rows.append([title, old, tuning.origin_before(name), new])
    before, after = duration(tuning.seconds_before), duration(tuning.seconds_after)
    rows.append(["r2v, 5 s at 480P, as published", before, "", after])
    return f"{table(rows)}\nsaved in {tuning.file}: `skyrun plan` and `skyrun run` use it"
