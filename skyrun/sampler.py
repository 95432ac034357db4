"""Samplers: from the model's velocities to the next, less noisy sample."""

from typing import Any, Protocol

import torch
from torch import Tensor

from skyrun.euler import Euler
from skyrun.unipc import UniPC

_KINDS: dict[str, type[UniPC] | type[Euler]] = {"unipc": UniPC, "euler": Euler}


class Sampler(Protocol):
    """One trajectory: `step` once per timestep, in order. sigmas: noise levels from 1 down, 0 at the end."""

    sigmas: list[float]
    index: int

    @property
    def timesteps(self) -> list[Any]:
        """What the model is told of the noise level, for each step."""

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample at the next noise level, given the model's velocity at this one. Both of the same shape."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the trajectory is: tensors by name, and plain values."""

    def on(self, device: torch.device) -> "Sampler":
        """One that goes on from here with what it remembers on the device; this one stays where it is."""


def restored(values: dict[str, Any], tensors: dict[str, Tensor]) -> Sampler:
    """The trajectory whose `state` this is. ValueError or LookupError if it contradicts itself."""
    return _KINDS[values["kind"]].restored(values, tensors)
