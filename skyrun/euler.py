"""Euler steps of flow matching, with the noise levels that the talking-avatar model was distilled with."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

_TRAIN_STEPS = 1000


class Euler:
    """One trajectory. Call `step` once per timestep, in order. Timesteps are 1000 times the noise levels, not whole."""

    def __init__(self, steps: int, shift: float) -> None:
        self._shift = shift
        even = np.linspace(_TRAIN_STEPS, 1, steps, dtype=np.float32)  # made in float64, as upstream's are
        levels = torch.from_numpy(np.append(even, np.float32(0))) / _TRAIN_STEPS
        shifted = shift * levels / (1 + (shift - 1) * levels) * _TRAIN_STEPS
        self.sigmas: list[float] = (shifted / _TRAIN_STEPS).tolist()
        self.timesteps: list[float] = shifted.tolist()[:-1]
        self.index = 0  # steps done

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample at the next noise level, given the model's velocity at this one. Both of the same shape."""
        length = self.sigmas[self.index] - self.sigmas[self.index + 1]
        self.index += 1
        return sample - velocity * length

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the trajectory is: tensors by name, and plain values."""
        return {}, {"kind": "euler", "steps": len(self.timesteps), "shift": self._shift, "index": self.index}

    @classmethod
    def restored(cls, values: dict[str, Any], tensors: dict[str, Tensor]) -> "Euler":
        """The trajectory whose `state` this is. ValueError if it contradicts itself."""
        sampler = cls(int(values["steps"]), float(values["shift"]))
        sampler.index = int(values["index"])
        if tensors or not 0 <= sampler.index <= len(sampler.timesteps):
            raise ValueError(f"its sampler cannot be after {sampler.index} steps of {len(sampler.timesteps)}")
        return sampler

    def on(self, device: torch.device) -> "Euler":
        """One that goes on from here; it remembers no tensors."""
        return Euler.restored(self.state()[1], {})
