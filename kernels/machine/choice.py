"""Choose the fastest of several candidates on this device: each is timed once per kind of work and cached on disk."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from threading import RLock
from typing import Any

import torch

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.machine.cache import MeasuredFile, checked
from skyrun.kernels.machine.device import device_name, driver_version, median_seconds
from skyrun.kernels.machine.failures import is_device_lost, is_out_of_memory, refused_allocations

Table = dict[str, dict[str, float]]  # seconds by candidate, by key; infinite where a candidate fails

_MARGIN = 0.03  # a later candidate has to be quicker by more than this: what is not clearly better does not win

_lock = RLock()  # what is measured may itself have to choose
_tables: dict[str, Table] = {}  # by device


def bucket(rows: int) -> int:
    """Rows rounded up to a power of two. Shapes in the same bucket share a choice."""
    return 1 << max(0, rows - 1).bit_length()


def seconds(device: torch.device, key: str, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The seconds that each working candidate takes on the device, from the cache or measured now.

    Args:
        device: where the candidates run.
        key: names the kind of work; work that takes equally long shares a key.
        candidates: functions without arguments that do the same work, by name.

    Raises SkyrunError if no candidate works.
    """
    with _lock:
        table = _table(device)
        known = table.get(key, {})
        if unknown := {name: work for name, work in candidates.items() if name not in known}:
            table[key] = known = known | _measure(device, unknown)
            _save(device, table)
    working = {name: known[name] for name in candidates if known[name] != float("inf")}
    if not working:
        raise SkyrunError(
            f"nothing that could do {key} works on {device_name(device)}", "see `skyrun doctor` and `skyrun bench`"
        )
    return working


def fastest(device: torch.device, key: str, candidates: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest candidate; the first one among those that are nearly as fast."""
    if len(candidates) == 1:
        return next(iter(candidates))
    known = seconds(device, key, candidates)
    limit = min(known.values()) * (1 + _MARGIN)
    return next(name for name, taken in known.items() if taken <= limit)


def _measure(device: torch.device, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    taken, refused = {}, refused_allocations()
    for name, work in candidates.items():
        try:
            taken[name] = median_seconds(device, work)
        except Exception as error:  # compilers and libraries raise all kinds of errors
            if is_out_of_memory(error, refused) or is_device_lost(error):
                raise  # memory is short at this moment, or nothing works: that does not rule out the candidate
            taken[name] = float("inf")
    return taken


def holds_for(device: torch.device) -> dict[str, str]:
    """What measurements depend on. If any of these values changes, they are made anew."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "driver": driver_version(device),
        "triton": _version("triton"),
        "skyrun": _version("skyrun"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _file(device: torch.device) -> MeasuredFile[Table]:
    safe = "".join(letter if letter.isalnum() else "-" for letter in device_name(device))
    return MeasuredFile(f"kernels-{safe}.json", holds_for(device), _parsed)


def _table(device: torch.device) -> Table:
    name = str(_file(device).path)
    if name not in _tables:
        _tables[name] = _file(device).load() or {}
    return _tables[name]


def _parsed(values: dict[str, Any]) -> Table:
    """Seconds from plain values."""
    return {
        str(key): {str(name): checked(taken) for name, taken in row.items()} for key, row in values["seconds"].items()
    }


def _plain(table: Table) -> Table:
    """What is kept on disk: a candidate that fails today may work when a compiler or another version is there."""
    return {key: {name: taken for name, taken in row.items() if taken != float("inf")} for key, row in table.items()}


def _save(device: torch.device, table: Table) -> None:
    """Keep the table, and learn what other processes have kept meanwhile."""

    def merge(kept: Table | None) -> dict[str, Any]:
        for key, row in (kept or {}).items():
            table[key] = row | table.get(key, {})
        return {"seconds": _plain(table)}

    with suppress(OSError):  # measured again next time; no reason to stop a run
        _file(device).update(merge)
