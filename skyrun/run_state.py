"""What a run has made so far: in memory to go on after a failure, on disk to go on in another process.

The file lies beside the clip: safetensors, with a description as JSON in its metadata. It is written whole or not at
all, and removed when the clip is finished.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.atomic import replacing
from skyrun.request import Request
from skyrun.sampler import UniPC

_VERSION = 1
_SUFFIX = ".skyrun.safetensors"
_START_ANEW = "run it again from the start; delete the file if -o is to keep its name"


@dataclass
class RunState:
    """Stages fill it in order; what is there is finished.

    text: the prompt's embedding. pictures: latents of the references [16, R, h, w]. latents: the clip [16, F, h, w]
    after `steps` steps of the sampler.
    """

    text: Tensor | None = None
    pictures: Tensor | None = None
    latents: Tensor | None = None
    sampler: UniPC | None = None
    steps: int = 0
    model: str = field(default="", compare=False)  # a fingerprint of its files

    @property
    def is_worth_keeping(self) -> bool:
        """Whether anything is finished."""
        return self.text is not None or self.pictures is not None or self.steps > 0


def state_path(output: Path) -> Path:
    """Where the state of a clip is kept; of a state's own path, that path."""
    return output if output.name.endswith(_SUFFIX) else output.with_name(f"{output.stem}{_SUFFIX}")


def save_state(path: Path, state: RunState, request: Request) -> None:
    """Write the state. OSError if it cannot be written; what was there before stays then."""
    tensors = {name: getattr(state, name) for name in ("text", "pictures", "latents")}
    described: dict[str, Any] = {
        "version": _VERSION, "request": request.absolute().as_json(), "steps": state.steps, "model": state.model
    }  # fmt: skip
    if state.sampler is not None:
        history, described["sampler"] = state.sampler.state()
        tensors |= {f"sampler.{name}": tensor for name, tensor in history.items()}
    whole = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items() if tensor is not None}
    try:
        with replacing(path) as partial:
            save_file(whole, partial, {"skyrun": json.dumps(described)})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def load_state(path: Path) -> tuple[RunState, Request]:
    """Read a state and the request that it belongs to. SkyrunError if it is damaged or from another version."""
    try:
        with safe_open(str(path), framework="pt") as file:
            described = json.loads((file.metadata() or {})["skyrun"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is no dict
        if described["version"] != _VERSION:
            raise SkyrunError(f"{path} was written by another version of skyrun", _START_ANEW)
        request = Request.from_json(described["request"])
        state = RunState(steps=int(described["steps"]), model=str(described["model"]))
        state.text, state.pictures, state.latents = (tensors.get(name) for name in ("text", "pictures", "latents"))
        if "sampler" in described:
            history = {name.removeprefix("sampler."): t for name, t in tensors.items() if name.startswith("sampler.")}
            state.sampler = UniPC.restored(described["sampler"], history)
    except FileNotFoundError as error:
        raise SkyrunError(f"there is no unfinished run in {path}", "start it with `skyrun run`") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SkyrunError(f"{path} is not the state of a run, or is damaged: {error}", _START_ANEW) from error
    if state.steps and (state.latents is None or state.sampler is None):
        raise SkyrunError(f"{path} is damaged: it has {state.steps} steps without their latents", _START_ANEW)
    return state, request


def remove_state(path: Path) -> None:
    """The clip is finished."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise SkyrunError(f"{path} is no longer needed, but cannot be removed: {error}", "remove it", FAILED) from error


def on_device(state: RunState, device: torch.device) -> RunState:
    """Move what the next stage computes with to the device, in place."""
    for name in ("pictures", "latents"):
        if (tensor := getattr(state, name)) is not None:
            setattr(state, name, tensor.to(device))
    if state.sampler is not None:
        state.sampler.to(device)
    return state
