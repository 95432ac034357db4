"""Where skyrun keeps what it has measured."""

import os
import sys
from pathlib import Path

from skyrun.kernels.errors import SkyrunError

_FOLDER = "SKYRUN_CACHE"  # environment variable


def cache_folder() -> Path:
    """$SKYRUN_CACHE, or a folder of skyrun's in the user's cache."""
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
