"""A stage of the training: steps that depend on the weights, the seed and their own number, and on nothing else."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from skyrun.kernels.files.atomic import replacing

Weights = dict[str, Tensor]
Losses = dict[str, float]  # of a step, by name


class Optimizer(Protocol):
    """What changes the weights."""

    def step(self, factor: float) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Random:
    """The random numbers of a step: for drawing pictures, and for noise."""

    draw: Generator
    noise: torch.Generator

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.noise)


@dataclass
class Stage:
    """What a stage trains and for how long.

    loss: computes the loss of step n; what it returns beside that is reported. warm_up: steps in which the learning
    rate rises; it falls to nothing over the last `decay` of all steps.
    """

    name: str
    steps: int
    weights: Weights
    optimizer: Optimizer
    loss: Callable[[int, Random], tuple[Tensor, Losses]]
    warm_up: int = 50
    decay: float = 1.0


def random_of(seed: int, name: str, step: int) -> Random:
    """The random numbers of a step. They do not depend on any other step, so that a run can go on from any."""
    words = np.random.SeedSequence([seed, *name.encode(), step]).generate_state(2)
    return Random(np.random.default_rng(words[0]), torch.Generator().manual_seed(int(words[1])))


def run_stage(stage: Stage, folder: Path, seed: int, report: list[dict[str, Any]], save_every: int) -> None:
    """Train the stage's weights in place, going on from the state in the folder if there is one.

    Every `save_every` steps the state is saved to `NAME.state.pt`, with what the report says of the stage.
    """
    path = folder / f"{stage.name}.state.pt"
    first, entry = 0, {"stage": stage.name, "steps": stage.steps, "seconds": 0.0, "losses": []}
    with suppress(FileNotFoundError):
        saved = torch.load(path, weights_only=True)
        first, entry = saved["step"], saved["report"]
        with torch.no_grad():
            for name, weight in stage.weights.items():
                weight.copy_(saved["weights"][name])
        stage.optimizer.load_state_dict(saved["optimizer"])
    report.append(entry)
    window: list[Losses] = []
    started = time.monotonic()
    for step in range(first, stage.steps):
        loss, said = stage.loss(step, random_of(seed, stage.name, step))
        loss.backward()
        stage.optimizer.step(_factor(step, stage))
        window.append(said)
        if (step + 1) % save_every == 0 or step + 1 == stage.steps:
            entry["losses"].append({"step": step + 1} | mean_of(window))
            entry["seconds"] += time.monotonic() - started
            started, window = time.monotonic(), []
            _tell(stage, entry)
            _save(path, stage, step + 1, entry)


def mean_of(losses: Sequence[Losses]) -> Losses:
    """The mean of each loss over the steps that have it."""
    names = {name for said in losses for name in said}
    each = {name: [said[name] for said in losses if name in said] for name in sorted(names)}
    return {name: round(math.fsum(values) / len(values), 5) for name, values in each.items()}


def _factor(step: int, stage: Stage) -> float:
    left = (stage.steps - step) / (stage.steps * stage.decay)
    return min(1.0, (step + 1) / stage.warm_up, left)


def _tell(stage: Stage, entry: dict[str, Any]) -> None:
    last = dict(entry["losses"][-1])
    step = last.pop("step")
    losses = ", ".join(f"{name} {value:.4f}" for name, value in last.items())
    print(f"{stage.name}: step {step} of {stage.steps}, {entry['seconds']:.0f} s: {losses}", flush=True)


def _save(path: Path, stage: Stage, step: int, entry: dict[str, Any]) -> None:
    weights = {name: weight.detach() for name, weight in stage.weights.items()}
    with replacing(path) as partial:
        torch.save(
            {"step": step, "weights": weights, "optimizer": stage.optimizer.state_dict(), "report": entry}, partial
        )
