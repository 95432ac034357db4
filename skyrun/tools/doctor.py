"""What decides speed or failure on this machine, each with a verdict and a remedy. Fast: torch is not imported."""

import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from skyrun.hub.store import MODELS_VARIABLE, models_folder
from skyrun.kernels.disk import existing_folder
from skyrun.planning.hardware import load_tuned
from skyrun.presets.host import disk_rate, free_space, memory, where
from skyrun.presets.nvidia_smi import query

_GIB = 1 << 30
_COMFORTABLE_RAM = 12 * _GIB
_MODEL_SPACE = 25 * _GIB  # a Q8_0 model with its text encoder
_CUDA_INDEX = "https://download.pytorch.org/whl/cu128"
_DRIVERS = {"11": 450, "12": 525, "13": 580}  # the oldest driver for each CUDA
_SLOW_DISK = 0.3e9  # bytes per second
_STREAMED = 15e9  # bytes of a 14B model in Q8_0
_OLDEST_CAPABILITY = 8  # as kernels.device has it, which would import torch
_LABELS = {"good": "good ", "slow": "slow ", "fails": "FAILS"}


@dataclass(frozen=True)
class Finding:
    """verdict: "good", "slow" (works, but could be better) or "fails"."""

    subject: str
    verdict: str
    found: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        line = f"{_LABELS[self.verdict]}  {self.subject}: {self.found}"
        return f"{line}\n       -> {self.remedy}" if self.remedy else line


def examine() -> list[Finding]:
    """All checks, the most decisive first."""
    gpu = query("name,memory.total,memory.free,driver_version")
    models = models_folder()
    machine = [_python(), _torch(gpu), _gpu(gpu), _kernels(gpu), _system(gpu), _ram()]
    return [*machine, _space(models), _disk(models), _tuned(gpu)]


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("Python", "good", found)


def _torch(gpu: str) -> Finding:
    try:
        found = f"torch {version('torch')}"
    except PackageNotFoundError:
        return Finding("torch", "fails", "not installed", 'pip install "torch<2.14"')
    cuda = _cuda_of_torch()
    if gpu and not cuda:
        remedy = f'pip install --force-reinstall "torch<2.14" --index-url {_CUDA_INDEX}'
        return Finding("torch", "slow", f"{found} has no CUDA, but there is a GPU", remedy)
    needed, driver = _DRIVERS.get(cuda.split(".")[0], 0), _driver_major(gpu)
    if gpu and driver < needed:
        said = f"{found} with CUDA {cuda} needs driver {needed}, there is {driver}"
        return Finding("torch", "fails", said, "update the NVIDIA driver")
    return Finding("torch", "good", f"{found}, {f'CUDA {cuda}' if cuda else 'CPU only'}")


def _cuda_of_torch() -> str:
    """The CUDA version that torch was built with, read from its version file: importing it takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    text = (Path(spec.origin).parent / "version.py").read_text()
    match = re.search(r"^cuda[^=\n]*=\s*'([^']+)'", text, re.MULTILINE)
    return match[1] if match else ""


def _driver_major(gpu: str) -> int:
    """The first number of the driver's version, the last field of what nvidia-smi said."""
    match = re.search(r"(\d+)[\d.]*$", gpu)
    return int(match[1]) if match else 0


def _gpu(gpu: str) -> Finding:
    if not gpu:
        return Finding(
            "GPU", "slow", "no NVIDIA GPU found", "clips are made on the CPU, which takes hours for real models"
        )
    return Finding("GPU", "good", gpu)


def _kernels(gpu: str) -> Finding:
    """Which kernels decode and multiply weights, and what it costs if they are not Triton's."""
    if not gpu:
        return Finding("kernels", "good", "torch, on the CPU")
    package = "triton-windows" if platform.system() == "Windows" else "triton"
    try:
        found = f"Triton {version(package)}"
    except PackageNotFoundError:
        remedy = f'pip install "{package}>=3.6"'
        return Finding("kernels", "slow", "torch, as Triton is not installed: no int8, slower decoding", remedy)
    if capability := re.search(r"(\d+)\.(\d+)", query("compute_cap")):
        said = f"compute capability {capability[0]}"
        if int(capability[1]) < _OLDEST_CAPABILITY:
            said = f"torch: the card has {said}, Triton's kernels need {_OLDEST_CAPABILITY}.0"
            return Finding("kernels", "slow", said, "a card of the RTX 3000 series or later is several times quicker")
        found = f"{found}, {said}"
    return Finding("kernels", "good", found)


def _ram() -> Finding:
    total, available = memory()
    found = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if total < psutil.virtual_memory().total:
        found += ", as much as this container may have"
    if total < _COMFORTABLE_RAM:
        return Finding("RAM", "slow", found, "close other programs; 16 GB are comfortable")
    return Finding("RAM", "good", found)


def _system(gpu: str) -> Finding:
    """What the operating system does with memory that is meant for the GPU."""
    system = where()
    if not gpu or system not in ("WSL", "Windows"):
        return Finding("system", "good", system)
    found = f"{system}: a full GPU is not said, memory moves to RAM, and steps take several times as long"
    remedy = 'in the NVIDIA Control Panel set "CUDA - Sysmem Fallback Policy" to "Prefer No Sysmem Fallback"'
    if system == "WSL":
        found += "; little memory can be page-locked"
    return Finding("system", "slow", found, f"{remedy}; skyrun looks after each step and makes a smaller plan")


def _space(folder: Path) -> Finding:
    """Room for a model, and whether Linux reads it through Windows."""
    there = existing_folder(folder)
    free = free_space(there)
    found = f"{free / _GIB:.0f} GiB free for {folder}"
    if where() == "WSL" and re.match(r"/mnt/[a-z](/|$)", str(there.resolve())):
        remedy = f"keep models inside Linux: export {MODELS_VARIABLE}=~/models"
        return Finding("models", "slow", f"{found}, on a disk of Windows, which WSL reads slowly", remedy)
    if free < _MODEL_SPACE:
        needed = f"a Q8_0 model takes {_MODEL_SPACE / _GIB:.0f} GiB"
        return Finding("models", "slow", found, f"{needed}: free space, use Q4_K, or set {MODELS_VARIABLE}")
    return Finding("models", "good", found)


def _disk(folder: Path) -> Finding:
    """How quick the disk with the models is, by the largest file among them."""
    files = sorted(folder.glob("*/*.gguf"), key=lambda path: path.stat().st_size)
    rate = disk_rate(files[-1]) if files else 0.0
    if not rate:
        return Finding("disk", "good", "not measured: there is no large model yet")
    found = f"{rate / 1e9:.2f} GB/s from {files[-1].parent}"
    if rate < _SLOW_DISK:
        hours = _STREAMED / rate / 60
        remedy = f"a step reads up to 15 GB, {hours:.0f} min here: move models to an SSD, or use Q4_K"
        return Finding("disk", "slow", found, remedy)
    return Finding("disk", "good", found)


def _tuned(gpu: str) -> Finding:
    if load_tuned("cuda" if gpu else "cpu") is None:
        return Finding("tuning", "good", "not done: times are predicted from tables", "skyrun tune, under two minutes")
    return Finding("tuning", "good", "done: plans rest on what was measured here")
