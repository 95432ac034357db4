"""Check what decides speed or failure on this machine. Only a process of its own imports torch, for a convolution."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from skyrun.errors import SkyrunError
from skyrun.hub.store import MODELS_VARIABLE, models_folder
from skyrun.kernels.files.disk import existing_folder
from skyrun.kernels.machine.cache import cache_folder
from skyrun.kernels.machine.capability import FLOAT8, OLDEST
from skyrun.kernels.machine.toolchain import missing, triton_package
from skyrun.planning.hardware import disk_number, load_tuned, tuned_path
from skyrun.presets.attention import ATTENTIONS
from skyrun.presets.machine.host import disk_rate, free_space, memory, where
from skyrun.presets.machine.nvidia_smi import peer_access, query
from skyrun.units import GIB, size

_COMFORTABLE_RAM = 12 * GIB
_MODEL_SPACE = 25 * GIB  # for a Q8_0 model with its text encoder
_CUDA_INDEX = "https://download.pytorch.org/whl/cu128"
_DRIVERS = {"11": 450, "12": 525, "13": 580}  # the oldest driver for each CUDA
_SLOW_DISK = 0.3e9  # bytes per second
_STREAMED = 15e9  # bytes of a 14B model in Q8_0
# The autoencoder's convolutions: times as long as 2-D ones of the same work, bytes per byte of the result that a buffer
# may take, and the error of 16-bit results.
_SLOW_CONVOLUTION, _LARGE_BUFFER, _WRONG = 2.0, 4, 0.03
_CONVOLUTION = (
    "import json, sys; from dataclasses import asdict; from skyrun.tools.convolution import measure_convolution; "
    "json.dump(asdict(measure_convolution()), sys.stdout)"
)
_PATIENCE = 120  # seconds for importing torch and a convolution
_LABELS = {"good": "good ", "unknown": "?    ", "slow": "slow ", "fails": "FAILS"}


@dataclass(frozen=True)
class Finding:
    """The result of a check. verdict: "good", "unknown" (not measured), "slow" (works, could be faster) or "fails"."""

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
    """Run all checks, the most decisive first. A check that cannot be run is a finding, too."""
    gpu = query("name,memory.total,memory.free,driver_version")
    device = "cuda" if gpu else "cpu"
    checks: dict[str, Callable[[], Finding]] = {
        "Python": _python,
        "torch": lambda: _torch(gpu),
        "GPU": lambda: _gpu(gpu),
        "kernels": lambda: _kernels(gpu),
        "convolution": _convolution,
        "system": lambda: _system(gpu),
        "RAM": _ram,
        "models": lambda: _space(models_folder()),
        "disk": lambda: _disk(models_folder(), device),
        **({"links": lambda: _links(gpu)} if ";" in gpu else {}),
        "tuning": lambda: _tuned(device),
        "cache": lambda: _cache(cache_folder()),
    }
    return [_finding(subject, check) for subject, check in checks.items()]


def _finding(subject: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except SkyrunError as error:
        return Finding(subject, "fails", error.message, error.hint)
    except OSError as error:
        return Finding(subject, "fails", f"cannot be checked: {error}", "check the path and its permissions")


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
    """The CUDA version that torch was built with, from its version file: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    text = (Path(spec.origin).parent / "version.py").read_text()
    match = re.search(r"^cuda[^=\n]*=\s*'([^']+)'", text, re.MULTILINE)
    return match[1] if match else ""


def _driver_major(gpu: str) -> int:
    """The major version of the driver, which is the last field of nvidia-smi's answer."""
    match = re.search(r"(\d+)[\d.]*$", gpu)
    return int(match[1]) if match else 0


def _gpu(gpu: str) -> Finding:
    if not gpu:
        return Finding(
            "GPU", "slow", "no NVIDIA GPU found", "clips are made on the CPU, which takes hours for real models"
        )
    return Finding("GPU", "good", gpu)


def _kernels(gpu: str) -> Finding:
    """Which kernels decode and multiply weights."""
    if not gpu:
        return Finding("kernels", "good", "torch, on the CPU")
    if lack := missing():
        return Finding("kernels", "slow", f"torch, as {lack.what}: no int8, slower decoding", lack.remedy)
    found = "Triton"
    with suppress(PackageNotFoundError):  # a nightly torch brings it under another name
        found = f"Triton {version(triton_package())}"
    if capability := re.search(r"(\d+)\.(\d+)", query("compute_cap")):
        said = f"compute capability {capability[0]}"
        if (int(capability[1]), int(capability[2])) < OLDEST:
            said = f"torch: the card has {said}, Triton's kernels need {OLDEST[0]}.{OLDEST[1]}"
            return Finding("kernels", "slow", said, "a card of the RTX 3000 series or later is several times faster")
        major, minor = int(capability[1]), int(capability[2])
        there = [name for name in ATTENTIONS if name != "fp8" or (major, minor) >= FLOAT8]
        found = f"{found}, {said}, --attention {', '.join(there)}"
    return Finding("kernels", "good", found)


def _convolution() -> Finding:
    """How this torch computes the autoencoder's 3-D convolutions, measured in a process of its own."""
    try:
        command = [sys.executable, "-c", _CONVOLUTION]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
        measured = json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        done, measured = None, None
    if measured is None:
        lines = done.stderr.strip().splitlines() if done else []
        cause = lines[-1] if lines else f"nothing came within {_PATIENCE} s"
        return Finding("convolution", "unknown", f"not measured: {cause}", "see what is said about torch and the GPU")
    return judge_convolution(measured)


def judge_convolution(measured: dict[str, Any]) -> Finding:
    """Judge what `skyrun.tools.convolution` measured."""
    ratio, buffer = measured["seconds"] / measured["apart_seconds"], measured["buffer"]
    found = f"3-D in {measured['dtype']} takes {ratio:.2f} of the time of 2-D ones"
    remedy = f'another version of torch: pip install -U "torch<2.14" --index-url {_CUDA_INDEX}'
    if not measured["error"] <= _WRONG:
        return Finding("convolution", "fails", f"{found}, and the result is {measured['error']:.0%} off", remedy)
    if buffer > _LARGE_BUFFER * measured["result"]:
        found += f", in a buffer of {buffer / measured['result']:.0f} times the result"
        return Finding("convolution", "slow", f"{found}: decoding may run out of memory", remedy)
    if ratio > _SLOW_CONVOLUTION:
        return Finding("convolution", "slow", f"{found}: decoding takes longer than planned", remedy)
    return Finding("convolution", "good", found)


def _ram() -> Finding:
    total, available = memory()
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB free"
    if total < psutil.virtual_memory().total:
        found += ", the limit of this container"
    if total < _COMFORTABLE_RAM:
        return Finding("RAM", "slow", found, "close other programs; 16 GB are comfortable")
    return Finding("RAM", "good", found)


def _system(gpu: str) -> Finding:
    """Whether the operating system may spill GPU memory to RAM."""
    system = where()
    if not gpu or system not in ("WSL", "Windows"):
        return Finding("system", "good", system)
    found = f"{system}: Windows does not report a full GPU; it silently spills VRAM to RAM, and steps take far longer"
    remedy = 'in the NVIDIA Control Panel set "CUDA - Sysmem Fallback Policy" to "Prefer No Sysmem Fallback"'
    if system == "WSL":
        found += "; little memory can be page-locked"
    return Finding("system", "slow", found, f"{remedy}; skyrun checks after each step and makes a smaller plan")


def _space(folder: Path) -> Finding:
    """Whether there is space for a model, and whether WSL reads it from a Windows disk."""
    there = existing_folder(folder)
    free = free_space(there)
    found = f"{folder}, with {free / GIB:.0f} GiB free"
    if where() == "WSL" and re.match(r"/mnt/[a-z](/|$)", str(there.resolve())):
        remedy = f"keep models inside Linux: export {MODELS_VARIABLE}=~/models"
        return Finding("models", "slow", f"{found}, on a Windows disk, which WSL reads slowly", remedy)
    if not os.access(there, os.W_OK):
        return Finding("models", "fails", f"{there} is not writable", f"set {MODELS_VARIABLE} to a folder of your own")
    if free < _MODEL_SPACE:
        needed = f"a Q8_0 model takes {_MODEL_SPACE / GIB:.0f} GiB"
        return Finding("models", "slow", found, f"{needed}: free space, use Q4_K, or set {MODELS_VARIABLE}")
    return Finding("models", "good", found)


def _disk(folder: Path, device: str) -> Finding:
    """How fast the disk with the models is, from tuning or by reading its largest model file now."""
    tuned = load_tuned(device)
    rate = tuned.disks.get(disk_number(existing_folder(folder)), 0.0) if tuned else 0.0
    source = "skyrun tune"
    if not rate and (files := sorted(folder.glob("*/*.gguf"), key=lambda path: path.stat().st_size)):
        rate, source = disk_rate(files[-1]), f"reading {files[-1].name}"
    if not rate:
        remedy = f"skyrun tune --model {existing_folder(folder)}, or check again when there is a model"
        return Finding("disk", "unknown", "not measured: there is no large model yet", remedy)
    found = f"{rate / 1e9:.2f} GB/s, measured by {source}"
    if rate < _SLOW_DISK:
        minutes = _STREAMED / rate / 60
        remedy = f"a step reads up to 15 GB, {minutes:.0f} min here: move models to an SSD, or use Q4_K"
        return Finding("disk", "slow", found, remedy)
    return Finding("disk", "good", found)


def _links(gpu: str) -> Finding:
    """How several GPUs reach each other, as the driver says, and how fast, from tuning."""
    count, tuned = len(gpu.split(";")), load_tuned("cuda")
    way = {True: ", from card to card", False: ", through the host's memory", None: ""}[peer_access()]
    if tuned is None or not tuned.peer_rate:
        return Finding("links", "unknown", f"{count} GPUs{way}, not measured", "skyrun tune, before --devices")
    return Finding("links", "good", f"each of {count} GPUs sends another {tuned.peer_rate / 1e9:.1f} GB/s{way}")


def _tuned(device: str) -> Finding:
    remedy = "skyrun tune, under two minutes"
    if load_tuned(device) is not None:
        return Finding("tuning", "good", f"done: plans use the rates in {tuned_path(device)}")
    if tuned_path(device).exists():
        found = f"out of date: other versions wrote {tuned_path(device).name}, or it is damaged"
        return Finding("tuning", "unknown", found, remedy)
    return Finding("tuning", "unknown", "not done: times are predicted from tables", remedy)


def _cache(folder: Path) -> Finding:
    """Where measurements and prompt embeddings are cached."""
    if not os.access(existing_folder(folder), os.W_OK):
        remedy = "set SKYRUN_CACHE to a folder of your own, or every run measures and encodes prompts again"
        return Finding("cache", "slow", f"{folder} is not writable", remedy)
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    if not files:
        return Finding("cache", "good", f"{folder}, empty")
    measured = sorted(path.name for path in files if path.suffix == ".json")
    prompts = sum(path.suffix == ".safetensors" for path in files)
    parts = [*measured, *([f"prompt embeddings ({prompts})"] if prompts else [])]
    return Finding("cache", "good", f"{folder}, {size(sum(path.stat().st_size for path in files))}: {', '.join(parts)}")
