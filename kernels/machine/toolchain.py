"""What Triton needs to build its kernels here: its package, a C compiler and Python's headers. Imports no torch."""

import os
import platform
import shutil
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Missing:
    """What is missing, and how to install it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: no int8 and slower decoding; {self.remedy}"


def triton_package() -> str:
    """The package that brings Triton on this system."""
    return "triton-windows" if platform.system() == "Windows" else "triton"


def missing() -> Missing | None:
    """What keeps Triton from building kernels; None if nothing does. Nothing is compiled to find out."""
    if find_spec("triton") is None:
        return Missing("Triton is not installed", f'pip install "{triton_package()}>=3.3"')
    if platform.system() == "Windows":
        return None  # its package has a compiler and headers of its own
    if not any((os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))):
        return Missing("Triton finds no C compiler", "install gcc, as by `apt install gcc`, or set CC")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return Missing("Triton finds no Python.h", "install Python's headers, as by `apt install python3-dev`")
    return None
