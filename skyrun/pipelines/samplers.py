"""Samplers for flow matching: from the model's velocities to the next, less noisy sample.

UniPC: Zhao et al. 2023, order 2, B(h) = expm1(-h) ("bh2"), data prediction, the last step of order 1. Its sigmas are
those of diffusers 0.34, which the models were distilled with; later versions moved them. Euler: with the sigmas that
the talking-avatar model was distilled with.
"""

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from skyrun.tasks import TaskSpec

_TRAIN_STEPS = 1000
_TOP = 0.999  # the highest noise level before the shift


def shifted_sigmas(steps: int, shift: float) -> list[float]:
    """`steps` falling noise levels and a final 0: even levels u from 0.999 become shift u / (1 + (shift - 1) u)."""
    even = (_TOP * (1 - step / steps) for step in range(steps))
    return [shift * u / (1 + (shift - 1) * u) for u in even] + [0.0]


class UniPC:
    """One trajectory. Call `step` once per timestep, in order."""

    def __init__(self, steps: int, shift: float) -> None:
        self._shift = shift
        self.sigmas = shifted_sigmas(steps, shift)
        # The model was trained on whole timesteps and gets them truncated; the solver keeps the exact level.
        self.timesteps = [int(_TRAIN_STEPS * sigma) for sigma in self.sigmas[:-1]]
        self.index = 0  # steps done
        self._predictions: list[Tensor] = []  # clean-sample predictions of the last steps, newest last
        self._start: Tensor | None = None  # the sample that the last step started from
        self._order = 0  # of the last predictor; its corrector has the same

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample at the next noise level, given the model's velocity at this one. Both of the same shape."""
        clean = sample - self.sigmas[self.index] * velocity
        if self._start is not None:
            sample = self._correct(self._start, clean)
        remaining = len(self.timesteps) - self.index
        self._predictions = [*self._predictions[-1:], clean]
        self._order = min(2, len(self._predictions), remaining)
        self._start = sample
        self.index += 1
        return self._predict(sample)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the trajectory is: tensors by name, and plain values."""
        tensors = {f"prediction{index}": tensor for index, tensor in enumerate(self._predictions)}
        if self._start is not None:
            tensors["start"] = self._start
        return tensors, {"kind": "unipc", "steps": len(self.timesteps), "shift": self._shift, "index": self.index}

    @classmethod
    def restored(cls, values: dict[str, Any], tensors: dict[str, Tensor]) -> "UniPC":
        """The trajectory whose `state` this is. ValueError if it contradicts itself."""
        sampler = cls(int(values["steps"]), float(values["shift"]))
        sampler.index, sampler._start = int(values["index"]), tensors.get("start")
        sampler._predictions = [tensors[name] for name in ("prediction0", "prediction1") if name in tensors]
        predictions, remaining = min(2, sampler.index), len(sampler.timesteps) - sampler.index
        if remaining < 0 or len(sampler._predictions) != predictions or (sampler._start is None) != (predictions == 0):
            raise ValueError(f"its sampler does not remember what it would after {sampler.index} steps")
        sampler._order = min(predictions, remaining + 1)
        return sampler

    def on(self, device: torch.device) -> "UniPC":
        """One that goes on from here with what it remembers on the device; this one stays where it is."""
        tensors, values = self.state()
        return UniPC.restored(values, {name: tensor.to(device) for name, tensor in tensors.items()})

    def _predict(self, sample: Tensor) -> Tensor:
        result, h, weight = self._first_order(sample)
        return result - self._slope(h) * (0.5 * weight) if self._order == 2 else result

    def _correct(self, start: Tensor, clean: Tensor) -> Tensor:
        """Redo the last step, now that the prediction at its end is known. `_predictions` still end at its start."""
        result, h, weight = self._first_order(start)
        change = clean - self._predictions[-1]
        if self._order == 1:
            return result - change * (0.5 * weight)
        step = math.expm1(-h)
        phi = step / -h - 1
        b1, b2 = phi / step, 2 * (phi / -h - 0.5) / step
        rho_slope = (b2 - b1) / (self._ratio(h) - 1)
        return result - (self._slope(h) * rho_slope + change * (b1 - rho_slope)) * weight

    def _first_order(self, sample: Tensor) -> tuple[Tensor, float, float]:
        """The step from `index - 1` to `index` with a constant prediction, its length h, and the weight of changes."""
        here, there = self.sigmas[self.index - 1], self.sigmas[self.index]
        h = _log_snr(there) - _log_snr(here)
        weight = (1 - there) * math.expm1(-h)
        return sample * (there / here) - self._predictions[-1] * weight, h, weight

    def _ratio(self, h: float) -> float:
        """Length of the step before, going back, over h."""
        return (_log_snr(self.sigmas[self.index - 2]) - _log_snr(self.sigmas[self.index - 1])) / h

    def _slope(self, h: float) -> Tensor:
        """Change of the prediction over the step before, scaled to a step of length h."""
        before, newest = self._predictions
        return (before - newest) / self._ratio(h)


def _log_snr(sigma: float) -> float:
    """Half the log of the signal-to-noise ratio at a noise level."""
    return math.log((1 - sigma) / sigma) if sigma else math.inf


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


def new_sampler(spec: TaskSpec, steps: int) -> Sampler:
    """The beginning of a trajectory, as the task's model was distilled."""
    return _KINDS[spec.sampler](steps, spec.shift)


def restored(values: dict[str, Any], tensors: dict[str, Tensor]) -> Sampler:
    """The trajectory whose `state` this is. ValueError or LookupError if it contradicts itself."""
    return _KINDS[values["kind"]].restored(values, tensors)
