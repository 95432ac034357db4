"""skyrun makes SkyReels-V3 videos on ordinary graphics cards.

from skyrun import Request, run
result = run(Request(task="r2v", prompt="...", images=("her.png",), model="models/"))
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrun.version import __version__

# A checkout keeps quant/, kernels/ and presets/ beside this folder; a wheel keeps them in it.
_checkout = Path(__file__).parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))

if TYPE_CHECKING:
    from skyrun.engine.run import Result, run
    from skyrun.kernels.errors import SkyrunError
    from skyrun.planning.request import Request

__all__ = ["Request", "Result", "SkyrunError", "__version__", "run"]

# Resolved on first use, so that `skyrun --help` does not pay for torch.
_homes = {
    "Request": "skyrun.planning.request",
    "Result": "skyrun.engine.run",
    "run": "skyrun.engine.run",
    "SkyrunError": "skyrun.kernels.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _homes:
        raise AttributeError(f"module 'skyrun' has no attribute {name!r}")
    return getattr(import_module(_homes[name]), name)
