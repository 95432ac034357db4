"""Convert checkpoints to GGUF: read, rename, choose types, encode, write."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrun.quant.conversion import convert
    from skyrun.quant.encoders.encode import quantize

__all__ = ["convert", "quantize"]

_homes = {"convert": "skyrun.quant.conversion", "quantize": "skyrun.quant.encoders.encode"}


def __getattr__(name: str) -> Any:
    if name not in _homes:
        raise AttributeError(f"module 'skyrun.quant' has no attribute {name!r}")
    return getattr(import_module(_homes[name]), name)
