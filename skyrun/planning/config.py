"""The user's defaults: ~/.config/skyrun/config.toml. Nothing here imports torch.

models = "/mnt/big/models"   # where models are kept; SKYRUN_MODELS goes before it
resolution = "480P"          # of clips
quant = "Q6_K"               # of models that are pulled
prefer = "speed"             # balanced, quality, speed or memory
"""

import os
import re
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from skyrun.errors import SkyrunError
from skyrun.presets.plan import PREFERENCES
from skyrun.tasks.sizes import BUCKETS

_MOST = 1 << 16  # bytes of the file


@dataclass(frozen=True)
class Config:
    """Values that hold where an option says nothing; None: not set. path: the file, whether it is there or not."""

    path: Path
    models: str | None = None
    resolution: str | None = None
    quant: str | None = None
    prefer: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"path": str(self.path)}

    def text(self) -> str:
        """The file and what it sets, in a line."""
        if not self.path.exists():
            return f"config {self.path}: not there, so the usual defaults hold"
        values = {name: value for name, value in asdict(self).items() if name != "path" and value is not None}
        said = ", ".join(f"{name} = {value}" for name, value in values.items())
        return f"config {self.path}: {said or 'sets nothing'}"


def config_path() -> Path:
    """Where the file is: in XDG_CONFIG_HOME, by default ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        folder = Path(base) if Path(base).is_absolute() else Path.home() / ".config"
    except RuntimeError:  # no HOME, and a user that the system does not know
        folder = Path("/nonexistent")
    return folder / "skyrun" / "config.toml"


def read_config() -> Config:
    """The user's defaults. SkyrunError that names the file and the line if it says something else."""
    path = config_path()
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST + 1).decode("utf-8-sig")
        if len(text) > _MOST:
            raise ValueError(f"it is longer than {_MOST} bytes, expected a few lines")
        values = tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        return Config(path)
    except (OSError, ValueError, RecursionError) as error:  # tomllib's says the line
        raise SkyrunError(f"{path} cannot be read: {error}", "correct that line, or remove the file") from error
    for name, value in values.items():
        if problem := _problem(name, value):
            raise SkyrunError(f"{path}, line {_line(text, name)}: {problem}", "correct that line, or remove it")
    return Config(path, **{name: _normal(name, value) for name, value in values.items()})


def _problem(name: str, value: Any) -> str:
    names = [known.name for known in fields(Config) if known.name != "path"]
    if name not in names:
        return f"unknown name {name!r}, expected {', '.join(names)}"
    if not isinstance(value, str) or not value:
        return f'{name} is {value!r}, expected text in quotes, such as {name} = "{_EXAMPLES[name]}"'
    if name == "resolution" and value.upper() not in BUCKETS:
        return f"unknown resolution {value!r}, expected {', '.join(BUCKETS)}"
    if name == "prefer" and value not in PREFERENCES:
        return f"unknown preference {value!r}, expected {', '.join(PREFERENCES)}"
    return ""


_EXAMPLES = {"models": "/mnt/big/models", "resolution": "480P", "quant": "Q8_0", "prefer": "quality"}


def _normal(name: str, value: str) -> str:
    return str(Path(value).expanduser()) if name == "models" else value if name == "prefer" else value.upper()


def _line(text: str, name: str) -> int:
    """Where a name is set, counted from 1."""
    pattern = re.compile(rf"\s*[\[\"']*{re.escape(name)}\b")
    return next((number for number, line in enumerate(text.split("\n"), 1) if pattern.match(line)), 1)
