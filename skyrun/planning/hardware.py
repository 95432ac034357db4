"""Describe this machine, with the measurements of `skyrun tune`. Imports torch only to examine a GPU."""

import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from skyrun.kernels.atomic import replacing
from skyrun.kernels.cache import cache_folder
from skyrun.presets import Hardware, probe
from skyrun.presets.cards import Rates
from skyrun.presets.hardware import MEASURED
from skyrun.presets.host import cpu_name
from skyrun.presets.nvidia_smi import query


@dataclass(frozen=True)
class Tuned:
    """What `skyrun tune` measured.

    rates: of computing. link_rate: bytes per second to the GPU; 0 without one. disks: bytes per second by disk_number.
    """

    rates: Rates
    link_rate: float = 0.0
    disks: dict[str, float] = field(default_factory=dict)


def this_machine(device: str | None = None, model: Path | None = None) -> Hardware:
    """The hardware of this machine. If the disk and the link to the GPU were not tuned, they are measured briefly.

    device: "cuda" or "cpu"; None looks for a GPU. model: a file on the disk that models are read from.
    """
    device = device or _found_device()
    tuned = load_tuned(device)
    disk = tuned.disks.get(disk_number(model), 0.0) if tuned else 0.0
    found = probe(device, model or Path.cwd(), measure=not disk)
    if tuned is None:
        return found
    gain = tuned.rates.fast_linear / tuned.rates.linear
    found = found.knowing(MEASURED, rates=tuned.rates, fast_gain=gain)
    if tuned.link_rate:
        found = found.knowing(MEASURED, link_rate=tuned.link_rate)
    return found.knowing(MEASURED, disk_rate=disk) if disk else found


def _found_device() -> str:
    """ "cuda" if the driver sees a GPU and torch can use it, else "cpu"."""
    if not query("name"):
        return "cpu"
    from skyrun.streaming.device import choose_device

    return choose_device(None).type


def disk_number(path: Path | None) -> str:
    """The device number of the file system that holds a path, or the current folder if the path does not exist."""
    return str(os.stat(path if path is not None and path.exists() else Path.cwd()).st_dev)


def load_tuned(device: str) -> Tuned | None:
    """Load the tuning results if they match the installed versions and this machine, else None."""
    try:
        saved: Any = json.loads(_path(device).read_text())
        if saved["holds_for"] != _holds_for(device):
            return None
        return Tuned(Rates(**saved["rates"]), float(saved["link_rate"]), dict(saved["disks"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_tuned(device: str, tuned: Tuned) -> Path:
    """Save tuning results and return the file."""
    path = _path(device)
    with replacing(path) as partial:
        partial.write_text(json.dumps({"holds_for": _holds_for(device), **asdict(tuned)}, indent=1))
    return path


def _path(device: str) -> Path:
    return cache_folder() / f"machine-{device}.json"


def _holds_for(device: str) -> dict[str, str]:
    """What measurements depend on. If any of these values changes, they are no longer used."""
    packages = {name: _version(name) for name in ("torch", "triton", "skyrun")}
    return {"chip": query("name,driver_version") if device == "cuda" else cpu_name()} | packages


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
