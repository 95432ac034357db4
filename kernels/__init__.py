"""Kernels that decode and multiply quantized blocks. The lowest package: it imports nothing else of skyrun.

This is the one place where a backend is chosen. Callers use `dequantize` and `linear` and never ask which one runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skyrun.kernels.formats import FORMATS, Format, block_format

if TYPE_CHECKING:
    from skyrun.kernels.decode import dequantize
    from skyrun.kernels.matmul import linear
    from skyrun.kernels.weight import QuantizedWeight

__all__ = ["FORMATS", "Format", "QuantizedWeight", "block_format", "dequantize", "linear"]

# Imported on first use: reading a header needs the format table, but not torch.
_homes = {
    "dequantize": "skyrun.kernels.decode",
    "linear": "skyrun.kernels.matmul",
    "QuantizedWeight": "skyrun.kernels.weight",
}


def __getattr__(name: str) -> Any:
    if name not in _homes:
        raise AttributeError(f"module 'skyrun.kernels' has no attribute {name!r}")
    return getattr(import_module(_homes[name]), name)
