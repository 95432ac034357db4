"""Choose the fastest of several candidates on this device: each is timed once per kind of work and cached on disk."""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from skyrun.kernels.atomic import replacing
from skyrun.kernels.cache import cache_folder
from skyrun.kernels.device import device_name, median_seconds
from skyrun.kernels.errors import SkyrunError

_MARGIN = 0.03  # a later candidate wins only if it is faster by more than this share

_lock = RLock()  # reentrant: a candidate that is being measured may itself have to choose
_tables: dict[str, dict[str, dict[str, float]]] = {}  # seconds by candidate, by key, by device


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


def known_choices(device: torch.device) -> dict[str, dict[str, float]]:
    """Everything that was measured on the device: seconds by candidate, by key."""
    with _lock:
        return dict(_table(device))


def _measure(device: torch.device, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    taken = {}
    for name, work in candidates.items():
        try:
            taken[name] = median_seconds(device, work)
        except torch.OutOfMemoryError:
            raise  # memory is short at this moment; that does not rule out the candidate
        except Exception:  # compilers and libraries raise all kinds of errors; a candidate that fails is ruled out
            taken[name] = float("inf")
    return taken


def holds_for(device: torch.device) -> dict[str, str]:
    """What measurements depend on. If any of these values changes, they are made anew."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": _version("triton"),
        "skyrun": _version("skyrun"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _path(device: torch.device) -> Path:
    safe = "".join(letter if letter.isalnum() else "-" for letter in device_name(device))
    return cache_folder() / f"kernels-{safe}.json"


def _table(device: torch.device) -> dict[str, dict[str, float]]:
    name = str(_path(device))
    if name not in _tables:
        _tables[name] = _load(device)
    return _tables[name]


def _load(device: torch.device) -> dict[str, dict[str, float]]:
    """Load the cached measurements if they match the installed versions, else {}. A damaged file is ignored."""
    try:
        cached: Any = json.loads(_path(device).read_text())
        if cached["holds_for"] != holds_for(device):
            return {}
        return {
            str(key): {str(name): float("inf") if taken is None else float(taken) for name, taken in row.items()}
            for key, row in cached["seconds"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _save(device: torch.device, table: dict[str, dict[str, float]]) -> None:
    plain = {
        key: {name: None if taken == float("inf") else taken for name, taken in row.items()}
        for key, row in table.items()
    }
    try:
        with replacing(_path(device)) as partial:
            partial.write_text(json.dumps({"holds_for": holds_for(device), "seconds": plain}, indent=1))
    except OSError:
        pass  # without a cache the next run measures again; that must not stop this one
