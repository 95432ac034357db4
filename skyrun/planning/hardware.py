"""Describe this machine, with the measurements of `skyrun tune`. Imports torch only to examine a GPU."""

import os
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from skyrun.kernels.machine.cache import MeasuredFile, checked
from skyrun.kernels.machine.toolchain import missing
from skyrun.presets import Hardware, probe
from skyrun.presets.machine.cards import Rates
from skyrun.presets.machine.hardware import MEASURED, REPORTED
from skyrun.presets.machine.host import cpu_name
from skyrun.presets.machine.nvidia_smi import query


@dataclass(frozen=True)
class Tuned:
    """Measurements of this machine, in operations and bytes per second.

    link_rate: 0 without a GPU. disks: rates by the number that the system gives a file system.
    """

    rates: Rates
    link_rate: float = 0.0
    disks: dict[str, float] = field(default_factory=dict)


def this_machine(device: str | None = None, model: Path | None = None) -> Hardware:
    """Describe this machine, with tuned rates where there are some.

    device: None looks for a GPU. model: a file on the disk to read from. Where `skyrun tune` has not measured the disk
    and the link to a GPU, they are measured here, which takes about a second.
    """
    device = device or _found_device()
    tuned = load_tuned(device)
    disk = tuned.disks.get(disk_number(model), 0.0) if tuned else 0.0
    found = probe(device, model or Path.cwd(), measure=not disk)
    if tuned is not None:
        gain = tuned.rates.fast_linear / tuned.rates.linear
        found = found.knowing(MEASURED, rates=tuned.rates, fast_gain=gain)
        if tuned.link_rate:
            found = found.linked(MEASURED, tuned.link_rate)
        if disk:
            found = found.knowing(MEASURED, disk_rate=disk)
    if device == "cuda" and missing():  # without Triton, int8 gains nothing
        found = found.knowing(REPORTED, fast_gain=0.0)
    return found


def _found_device() -> str:
    """ "cuda" if the driver sees a GPU and torch can use it, else "cpu"."""
    if not query("name"):
        return "cpu"
    from skyrun.streaming.device import choose_device

    return choose_device(None).type


def disk_number(path: Path | None) -> str:
    """The number of the file system that holds a path; of the current folder's if there is no such path."""
    return str(os.stat(path if path is not None and path.exists() else Path.cwd()).st_dev)


def load_tuned(device: str) -> Tuned | None:
    """Load tuning results if they match this machine and the installed versions, else None."""
    return _file(device).load()


def save_tuned(device: str, tuned: Tuned) -> Path:
    """Save tuning results, and keep what is known of other disks. Returns the path of the file."""

    def merge(before: Tuned | None) -> dict[str, Any]:
        return asdict(replace(tuned, disks=(before.disks if before else {}) | tuned.disks))

    file = _file(device)
    file.update(merge)
    return file.path


def tuned_path(device: str) -> Path:
    """The path of the file with a device's tuning results."""
    return _file(device).path


def _file(device: str) -> MeasuredFile[Tuned]:
    return MeasuredFile(f"machine-{device}.json", _holds_for(device), _parsed)


def _parsed(values: dict[str, Any]) -> Tuned:
    """Tuning results from plain values. Only int8 and the link may be missing, which is a rate of 0."""
    rates = Rates(**{name: checked(rate) for name, rate in values["rates"].items()})
    disks = {str(number): checked(rate) for number, rate in values["disks"].items()}
    if not all((rates.linear, rates.attention, rates.decode, rates.convolution, *disks.values())):
        raise ValueError("a rate is 0")
    return Tuned(rates, checked(values["link_rate"]), disks)


def _holds_for(device: str) -> dict[str, str]:
    """The chip and the versions that tuning results depend on."""
    packages = {name: _version(name) for name in ("torch", "triton", "skyrun")}
    return {"chip": query("name,driver_version") if device == "cuda" else cpu_name()} | packages


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
