"""Samplers for flow matching: compute the next, less noisy sample from the model's velocity.

A sample is (1 - sigma) * x0 + sigma * noise, and the model predicts the velocity noise - x0.

UniPC is the solver of Zhao et al. 2023 (arXiv:2302.04867) of order 2 with B(h) = expm1(-h) ("bh2") and x0 prediction;
its last step has order 1. Its sigmas are those of diffusers 0.34, with which the models were distilled; later versions
changed them. Euler uses the sigmas with which the talking-avatar model was distilled.
"""

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from skyrun.tasks import TaskSpec
from skyrun.tasks.windows import BLOCK

_TRAIN_STEPS = 1000
_MAX_SIGMA = 0.999  # before the shift


def shifted_sigmas(steps: int, shift: float) -> list[float]:
    """`steps` falling sigmas and a final 0.

    Evenly spaced u from 0.999 down become shift u / (1 + (shift - 1) u) (Esser et al. 2024, arXiv:2403.03206).
    """
    even = (_MAX_SIGMA * (1 - step / steps) for step in range(steps))
    return [shift * u / (1 + (shift - 1) * u) for u in even] + [0.0]


class UniPC:
    """One trajectory. Call `step` once per timestep, in order."""

    kind = "unipc"

    def __init__(self, steps: int, shift: float) -> None:
        self._shift = shift
        self.sigmas = shifted_sigmas(steps, shift)
        # The model was trained on whole timesteps and gets them truncated; the solver uses the exact sigmas.
        self.timesteps = [int(_TRAIN_STEPS * sigma) for sigma in self.sigmas[:-1]]
        self.index = 0  # steps done
        self._predictions: list[Tensor] = []  # x0 predicted in the last steps, newest last
        self._start: Tensor | None = None  # the sample that the last step started from
        self._order = 0  # of the last predictor; its corrector has the same

    def clean(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample without noise, as the model's velocity predicts it."""
        return sample - self.sigmas[self.index] * velocity

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample at the next sigma, given the model's velocity for `sample` at the current one."""
        x0 = self.clean(velocity, sample)
        if self._start is not None:
            sample = self._correct(self._start, x0)
        remaining = len(self.timesteps) - self.index
        self._predictions = [*self._predictions[-1:], x0]
        self._order = min(2, len(self._predictions), remaining)
        self._start = sample
        self.index += 1
        return self._predict(sample)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is needed to continue the trajectory: tensors by name, and plain values."""
        tensors = {f"prediction{index}": tensor for index, tensor in enumerate(self._predictions)}
        if self._start is not None:
            tensors["start"] = self._start
        return tensors, {"kind": self.kind, "steps": len(self.timesteps), "shift": self._shift, "index": self.index}

    @classmethod
    def restored(cls, values: dict[str, Any], tensors: dict[str, Tensor]) -> "UniPC":
        """The trajectory that `state` described. Raises ValueError if the state contradicts itself."""
        sampler = cls(int(values["steps"]), float(values["shift"]))
        sampler.index, sampler._start = int(values["index"]), tensors.get("start")
        sampler._predictions = [tensors[name] for name in ("prediction0", "prediction1") if name in tensors]
        predictions, remaining = min(2, sampler.index), len(sampler.timesteps) - sampler.index
        if remaining < 0 or len(sampler._predictions) != predictions or (sampler._start is None) != (predictions == 0):
            raise ValueError(f"its sampler does not remember what it would after {sampler.index} steps")
        sampler._order = min(predictions, remaining + 1)
        return sampler

    def on(self, device: torch.device) -> "UniPC":
        """A copy of the trajectory with its tensors on the device."""
        tensors, values = self.state()
        return type(self).restored(values, {name: tensor.to(device) for name, tensor in tensors.items()})

    def _predict(self, sample: Tensor) -> Tensor:
        result, h, weight = self._first_order(sample)
        return result - self._slope(h) * (0.5 * weight) if self._order == 2 else result

    def _correct(self, start: Tensor, x0: Tensor) -> Tensor:
        """Redo the last step with `x0`, predicted at its end. The newest of `_predictions` is from its start."""
        result, h, weight = self._first_order(start)
        change = x0 - self._predictions[-1]
        if self._order == 1:
            return result - change * (0.5 * weight)
        step = math.expm1(-h)
        phi = step / -h - 1
        b1, b2 = phi / step, 2 * (phi / -h - 0.5) / step
        rho_slope = (b2 - b1) / (self._ratio(h) - 1)
        return result - (self._slope(h) * rho_slope + change * (b1 - rho_slope)) * weight

    def _first_order(self, sample: Tensor) -> tuple[Tensor, float, float]:
        """The step from `index - 1` to `index` with a constant x0; its length h; and the weight of changes of x0."""
        here, there = self.sigmas[self.index - 1], self.sigmas[self.index]
        h = _log_snr(there) - _log_snr(here)
        weight = (1 - there) * math.expm1(-h)
        return sample * (there / here) - self._predictions[-1] * weight, h, weight

    def _ratio(self, h: float) -> float:
        """The length of the step before, measured backwards (negative), divided by h."""
        return (_log_snr(self.sigmas[self.index - 2]) - _log_snr(self.sigmas[self.index - 1])) / h

    def _slope(self, h: float) -> Tensor:
        """The change of x0 over the step before, scaled to a step of length h."""
        before, newest = self._predictions
        return (before - newest) / self._ratio(h)


class ForcingUniPC(UniPC):
    """UniPC as in the code of diffusion forcing: the first step is corrected as if it had begun where it ended.

    That code writes the result of a step over the sample that the solver has kept as the step's start. After later
    steps, whose start was corrected, the solver has a tensor of its own.
    """

    kind = "forcing"

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample at the next sigma, given the model's velocity for `sample` at the current one."""
        result = super().step(velocity, sample)
        if self.index == 1:
            self._start = result.clone()
        return result


class Staggered:
    """Trajectories of blocks of frames, each some steps behind the one before: SkyReels-V2's `ar_step`.

    Every call of `step` is one pass over all frames. Blocks that have not begun keep their noise and the timestep 999,
    those that are finished have timestep 0.

    steps: of each block. shift: of the sigmas. frames: of the sample. lag: in steps.
    """

    kind = "staggered"

    def __init__(self, steps: int, shift: float, frames: int, lag: int) -> None:
        self._steps, self._shift, self._frames, self._lag = steps, shift, frames, lag
        self._rows = _staggered(steps, frames // BLOCK, lag)
        self._history: dict[str, Tensor] = {}  # of the blocks' solvers, each in the place of its block
        self.index = 0  # passes done

    @property
    def sigmas(self) -> list[float]:
        """Of the first block, from about 1 down to 0."""
        sigmas = shifted_sigmas(self._steps, self._shift)
        return [sigmas[min(row[0], self._steps + 1) - 1] for row in self._rows] + [0.0]

    @property
    def timesteps(self) -> list[tuple[int, ...]]:
        """In every pass the timestep of each frame."""
        known = [_TRAIN_STEPS - 1, *ForcingUniPC(self._steps, self._shift).timesteps, 0]
        return [tuple(known[place] for place in row for _ in range(BLOCK)) for row in self._rows]

    def clean(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample without noise, as the model's velocity predicts it."""
        sigmas = [1.0, *shifted_sigmas(self._steps, self._shift)]
        of_frames = [sigmas[place] for place in self._rows[self.index] for _ in range(BLOCK)]
        return sample - torch.tensor(of_frames, device=sample.device).view(1, -1, 1, 1) * velocity

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample after a step of every block whose turn it is."""
        before = self._rows[self.index - 1] if self.index else [0] * len(self._rows[0])
        history, result = {name: tensor.clone() for name, tensor in self._history.items()}, sample.clone()
        for block, (last, place) in enumerate(zip(before, self._rows[self.index], strict=True)):
            if place in (last, self._steps + 1):
                continue
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            values = {"steps": self._steps, "shift": self._shift, "index": place - 1}
            known = [f"prediction{number}" for number in range(min(2, place - 1))] + ["start"] * (place > 1)
            solver = ForcingUniPC.restored(values, {name: history[name][:, part] for name in known})
            result[:, part] = solver.step(velocity[:, part], sample[:, part])
            for name, tensor in solver.state()[0].items():
                history.setdefault(name, torch.zeros_like(sample))[:, part] = tensor
        self._history = history
        self.index += 1
        return result

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is needed to continue the trajectories: tensors by name, and plain values."""
        values = {"steps": self._steps, "shift": self._shift, "frames": self._frames, "lag": self._lag}
        return self._history, {"kind": self.kind, "index": self.index} | values

    @classmethod
    def restored(cls, values: dict[str, Any], tensors: dict[str, Tensor]) -> "Staggered":
        """The trajectories that `state` described. Raises ValueError if the state contradicts itself."""
        sampler = cls(*(kind(values[name]) for name, kind in _STAGGERED.items()))
        sampler.index, sampler._history = int(values["index"]), tensors
        known = {f"prediction{number}" for number in range(min(2, sampler.index))} | (
            {"start"} if sampler.index else set()
        )
        if not 0 <= sampler.index <= len(sampler._rows) or set(tensors) != known:
            raise ValueError(f"its sampler does not remember what it would after {sampler.index} passes")
        return sampler

    def on(self, device: torch.device) -> "Staggered":
        """A copy of the trajectories with their tensors on the device."""
        tensors, values = self.state()
        return Staggered.restored(values, {name: tensor.to(device) for name, tensor in tensors.items()})


_STAGGERED = {"steps": int, "shift": float, "frames": int, "lag": int}


def _staggered(steps: int, blocks: int, lag: int) -> list[list[int]]:
    """For every pass the step that each block takes, counted from 1; 0 before the first, steps + 1 after the last."""
    rows, before = [], [0] * blocks
    while min(before) < steps:
        row: list[int] = []
        for block in range(blocks):
            leads = block == 0 or before[block - 1] >= steps
            row.append(before[block] + 1 if leads else row[block - 1] - lag)
        before = [min(max(place, 0), steps + 1) for place in row]
        rows.append(before)
    return rows


def _log_snr(sigma: float) -> float:
    """Half the log of the signal-to-noise ratio at a sigma."""
    return math.log((1 - sigma) / sigma) if sigma else math.inf


class Euler:
    """One trajectory. Call `step` once per timestep, in order. Timesteps are 1000 * sigma, not rounded."""

    def __init__(self, steps: int, shift: float) -> None:
        self._shift = shift
        even = np.linspace(_TRAIN_STEPS, 1, steps, dtype=np.float32)  # computed in float64, like upstream's
        sigmas = torch.from_numpy(np.append(even, np.float32(0))) / _TRAIN_STEPS
        shifted = shift * sigmas / (1 + (shift - 1) * sigmas) * _TRAIN_STEPS
        self.sigmas: list[float] = (shifted / _TRAIN_STEPS).tolist()
        self.timesteps: list[float] = shifted.tolist()[:-1]
        self.index = 0  # steps done

    def clean(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample without noise, as the model's velocity predicts it."""
        return sample - self.sigmas[self.index] * velocity

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample at the next sigma, given the model's velocity for `sample` at the current one."""
        length = self.sigmas[self.index] - self.sigmas[self.index + 1]
        self.index += 1
        return sample - velocity * length

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is needed to continue the trajectory: no tensors, and plain values."""
        return {}, {"kind": "euler", "steps": len(self.timesteps), "shift": self._shift, "index": self.index}

    @classmethod
    def restored(cls, values: dict[str, Any], tensors: dict[str, Tensor]) -> "Euler":
        """The trajectory that `state` described. Raises ValueError if the state contradicts itself."""
        sampler = cls(int(values["steps"]), float(values["shift"]))
        sampler.index = int(values["index"])
        if tensors or not 0 <= sampler.index <= len(sampler.timesteps):
            raise ValueError(f"its sampler cannot be after {sampler.index} steps of {len(sampler.timesteps)}")
        return sampler

    def on(self, device: torch.device) -> "Euler":
        """A copy of the trajectory; it has no tensors."""
        return Euler.restored(self.state()[1], {})


_KINDS: dict[str, type[UniPC] | type[Euler]] = {"unipc": UniPC, "forcing": ForcingUniPC, "euler": Euler}
_RESTORED: dict[str, Any] = {**_KINDS, "staggered": Staggered}


class Sampler(Protocol):
    """One trajectory: `step` is called once per timestep, in order."""

    index: int

    @property
    def sigmas(self) -> list[float]:
        """From about 1 down to 0, one more than there are steps."""

    @property
    def timesteps(self) -> list[Any]:
        """The timestep that the model gets in each step, or those of all frames."""

    def clean(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample without noise, as the model's velocity predicts it."""

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample at the next sigma, given the model's velocity for `sample` at the current one."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is needed to continue the trajectory: tensors by name, and plain values."""

    def on(self, device: torch.device) -> "Sampler":
        """A copy of the trajectory with its tensors on the device."""


def new_sampler(spec: TaskSpec, steps: int, shift: float | None = None) -> Sampler:
    """A new trajectory with the sampler that the task's model was made for, and with its shift unless one is given."""
    return _KINDS[spec.sampler](steps, spec.shift if shift is None else shift)


def restored(values: dict[str, Any], tensors: dict[str, Tensor]) -> Sampler:
    """The trajectory that `state` described. Raises ValueError or LookupError if the state contradicts itself."""
    sampler: Sampler = _RESTORED[values["kind"]].restored(values, tensors)
    return sampler
