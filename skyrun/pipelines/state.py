"""What a run has made so far: in memory to continue after a failure, on disk to continue in another process.

The file lies beside the clip. It is a safetensors file with a JSON description in its metadata, is written atomically,
and is removed when the clip is finished.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.atomic import replacing
from skyrun.pipelines.samplers import Sampler, restored
from skyrun.planning.problems import parse_request
from skyrun.planning.request import Request

_VERSION = 2
_SUFFIX = ".skyrun.safetensors"
_START_ANEW = "begin anew with `skyrun run`; delete the file if -o is to keep its name"
_ENCODED, _CARRIED, _SAMPLER = "encoded.", "carried.", "sampler."
_CPU = torch.device("cpu")


@dataclass
class RunState:
    """What is finished of a run. Stages fill it in order. All tensors are on the host, so that they survive the device.

    encoded: inputs of the whole clip by name: embeddings of prompts, latents of images or video. window: how many
    windows are finished. carried: tensors by name that the last finished window passes to the next. latents: of the
    current window, [16, F, h, w], at the sigma that the sampler has reached. groups: how many groups of frames of the
    current window were yielded; each group is one latent frame.
    """

    encoded: dict[str, Tensor] = field(default_factory=dict)
    window: int = 0
    carried: dict[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    sampler: Sampler | None = None
    groups: int = 0

    @property
    def steps(self) -> int:
        """Finished denoising steps of the current window."""
        return self.sampler.index if self.sampler is not None else 0

    @property
    def mark(self) -> tuple[int, ...]:
        """A tuple that grows whenever anything is finished."""
        return len(self.encoded), self.window, self.steps, self.groups

    def finish_step(self, latents: Tensor, sampler: Sampler) -> None:
        """Store copies of a step's results, so that a step that fails midway changes nothing here."""
        self.latents, self.sampler = latents.to(_CPU), sampler.on(_CPU)

    def finish_window(self, **carried: Tensor) -> None:
        """Record that all frames of the window were yielded. carried: what the next window begins with."""
        self.window, self.carried = self.window + 1, carried
        self.latents, self.sampler, self.groups = None, None, 0


@dataclass(frozen=True)
class Origin:
    """How a state was made. model: the identity of its files. device, dtype, precision: those of its plan."""

    request: Request
    model: str
    device: str
    dtype: str
    precision: str


def state_path(output: Path) -> Path:
    """The file for a clip's state. If `output` is such a file already, it is returned."""
    return output if output.name.endswith(_SUFFIX) else output.with_name(f"{output.stem}{_SUFFIX}")


def clip_path(state: Path) -> Path:
    """The clip that a state belongs to."""
    return state.with_name(f"{state.name.removesuffix(_SUFFIX)}.mp4")


def save_state(path: Path, state: RunState, origin: Origin) -> None:
    """Write the state. Raises OSError if that fails; a file from before is then unchanged."""
    tensors = {f"{_ENCODED}{name}": tensor for name, tensor in state.encoded.items()}
    tensors |= {f"{_CARRIED}{name}": tensor for name, tensor in state.carried.items()}
    if state.latents is not None:
        tensors["latents"] = state.latents
    described: dict[str, Any] = {**vars(origin), "request": origin.request.absolute().as_json(), "window": state.window}
    if state.sampler is not None:
        history, described["sampler"] = state.sampler.state()
        tensors |= {f"{_SAMPLER}{name}": tensor for name, tensor in history.items()}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(described)
    try:
        with replacing(path) as partial:
            save_file(whole, partial, {"version": str(_VERSION), "run": text, "crc32": _checksum(text, whole)})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def load_state(path: Path) -> tuple[RunState, Origin]:
    """Read a state and its origin. Raises SkyrunError if the file is damaged or has another version."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is not a dict
        version, text = metadata["version"], metadata["run"]
        if version == str(_VERSION):
            if metadata["crc32"] != _checksum(text, tensors):
                raise ValueError("its contents do not have the checksum that it says")
            described = json.loads(text)
            sampler, window = described.pop("sampler", None), int(described.pop("window"))
            origin = Origin(**described | {"request": parse_request(described["request"])})
            return _state(tensors, window, sampler, origin.request), origin
    except FileNotFoundError as error:
        clip = clip_path(path)
        is_whole = f": {clip} is finished" if clip.exists() else ""
        raise SkyrunError(f"there is no unfinished run in {path}{is_whole}", "start one with `skyrun run`") from error
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SkyrunError(f"{path} is not the state of a run, or is damaged: {error}", _START_ANEW) from error
    message = f"{path} is a state of version {version}, this skyrun reads version {_VERSION}"
    raise SkyrunError(message, f"use the skyrun that wrote it, or {_START_ANEW}")


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    checksum = zlib.crc32(text.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(tensors[name].numpy(), checksum)  # type: ignore[arg-type]
    return f"{checksum:08x}"


def _state(tensors: dict[str, Tensor], window: int, described: dict[str, Any] | None, request: Request) -> RunState:
    """Build the state. Raises ValueError if the tensors are not those of this request."""

    def named(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    state = RunState(named(_ENCODED), window, named(_CARRIED), tensors.get("latents"))
    if described is not None:
        history = named(_SAMPLER)
        state.sampler = restored(described, history)
        assert isinstance(request.size, tuple)
        shape = (_latent_frames(request, window), *(side // 8 for side in request.size))
        clips = [*history.values(), *([] if state.latents is None else [state.latents])]
        if state.latents is None or any(tuple(tensor.shape[1:]) != shape for tensor in clips):
            raise ValueError(f"its tensors are not those of a clip of {shape} latents")
        if missing := request.spec.encoded - set(state.encoded):
            raise ValueError(f"its {', '.join(sorted(missing))} is missing")
        if described["steps"] != request.steps:
            raise ValueError(f"its sampler has {described['steps']} steps, its request {request.steps}")
    return state


def _latent_frames(request: Request, window: int) -> int:
    """Noisy frames of a window. Windows of speech are equal: a request does not know how many there are."""
    windows = request.windows()
    return windows[min(window, len(windows) - 1) if request.spec.audio else window].latents


def remove_state(path: Path) -> None:
    """Remove the state of a clip that is finished."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise SkyrunError(f"{path} is no longer needed, but cannot be removed: {error}", "remove it", FAILED) from error
