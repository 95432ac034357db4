"""The folder where skyrun caches its measurements."""

import os
import sys
from pathlib import Path

_FOLDER = "SKYRUN_CACHE"  # environment variable


def cache_folder() -> Path:
    """$SKYRUN_CACHE if it is set, else skyrun's folder in the user's cache."""
    if named := os.environ.get(_FOLDER):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "skyrun" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyrun"
