"""What a figure was measured with."""

import platform
from datetime import date

import psutil
import torch

import skyrun
from skyrun.units import GIB


def environment() -> str:
    """One line: date, processor, memory, versions."""
    memory = psutil.virtual_memory().total / GIB
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{date.today()}, {psutil.cpu_count()} x {platform.processor() or platform.machine()}, {memory:.0f} GiB RAM, "
        f"{gpu}, skyrun {skyrun.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
