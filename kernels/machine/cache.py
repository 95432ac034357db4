"""Where skyrun keeps what it has measured, and files of measurements that hold for certain versions."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.atomic import replacing

T = TypeVar("T")

_FOLDER = "SKYRUN_CACHE"  # environment variable
_PATIENCE = 10.0  # seconds to wait for another process that is saving


def cache_folder() -> Path:
    """$SKYRUN_CACHE if it is set, else skyrun's folder in the user's cache."""
    if named := os.environ.get(_FOLDER):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home_folder(_FOLDER) / "AppData" / "Local") / "skyrun" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or home_folder(_FOLDER) / ".cache") / "skyrun"


def home_folder(variable: str) -> Path:
    """The user's home. SkyrunError if nothing names one; `variable` would make it needless."""
    try:
        return Path.home()
    except RuntimeError as error:
        hint = f"set HOME, or {variable} to a folder that skyrun may use"
        raise SkyrunError("the user's home folder is not known: HOME is not set", hint) from error


class MeasuredFile(Generic[T]):
    """A JSON file of measurements in the cache folder. They count only for the versions they were made with.

    A file that is damaged, or that other versions wrote, counts as missing: everything in it can be measured again.
    """

    def __init__(self, name: str, holds_for: Mapping[str, str], parse: Callable[[dict[str, Any]], T]) -> None:
        """Describe the file; nothing is read yet.

        Args:
            name: The name of the file in the cache folder.
            holds_for: The devices and versions that the measurements depend on.
            parse: Makes plain values into what `load` returns. It raises ValueError, KeyError or the like for values
                that cannot be.
        """
        self._name, self._holds_for, self._parse = name, dict(holds_for), parse

    @property
    def path(self) -> Path:
        """Where the file is."""
        return cache_folder() / self._name

    def load(self) -> T | None:
        """What the file holds for these versions, else None."""
        try:
            values = dict(json.loads(self.path.read_text(encoding="utf-8")))
            holds_for, checksum = values.pop("holds_for"), values.pop("checksum")
            if holds_for != self._holds_for or checksum != _checksum(values):
                return None
            return self._parse(values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def update(self, merge: Callable[[T | None], dict[str, Any]]) -> None:
        """Save what `merge` makes of the values that are there now. No other process saves meanwhile.

        OSError if the folder cannot be written.
        """
        from filelock import FileLock

        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock", timeout=_PATIENCE):
            values = merge(self.load())
            whole = {"holds_for": self._holds_for, "checksum": _checksum(values), **values}
            with replacing(path, private=True) as partial:
                partial.write_text(json.dumps(whole, indent=1, allow_nan=False), encoding="utf-8")


def checked(value: Any) -> float:
    """A number as a measurement can have it: finite and not negative. ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{value!r} is not a measurement")
    return float(value)


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
