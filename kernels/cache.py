"""Where skyrun keeps what it has measured."""

import os
import sys
from pathlib import Path

_FOLDER = "SKYRUN_CACHE"  # environment variable


def cache_folder() -> Path:
    """$SKYRUN_CACHE, or a folder of skyrun's in the user's cache."""
    if named := os.environ.get(_FOLDER):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "skyrun" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyrun"
