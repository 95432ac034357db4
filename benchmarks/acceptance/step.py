"""A step of the acceptance run, the figures that it finds, and how large its work is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class NotHere(Exception):
    """A step needs what this machine does not have; the message says what."""


@dataclass(frozen=True)
class Figure:
    """What a step has found. least, most: bounds; without any the figure is not judged."""

    name: str
    value: float | str
    unit: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the value is within its bounds; None if there are none."""
        if self.least is None and self.most is None:
            return None
        value = float(self.value)  # NaN is within no bounds
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, "")} | {
            "passed": self.passed
        }


@dataclass(frozen=True)
class Scale:
    """Where the steps run, and how large their work is: on a card as real clips are, elsewhere small."""

    device: torch.device

    @property
    def small(self) -> bool:
        return self.device.type != "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, as plans choose it."""
        return torch.float32 if self.small else torch.bfloat16

    def of(self, large: T, small: T) -> T:
        """One of two sizes."""
        return small if self.small else large

    def on_card(self, bound: float) -> float | None:
        """A bound of speed or of memory, which counts on a card only."""
        return None if self.small else bound


@dataclass(frozen=True)
class Step:
    """page: of the documentation that its figures belong to. environment: variables that it needs when it starts,
    and on a CPU."""

    name: str
    about: str
    run: Callable[[Scale], Iterator[Figure]]
    page: str = "benchmarks.md"
    environment: Mapping[str, str] = field(default_factory=dict)
    on_cpu: Mapping[str, str] = field(default_factory=dict)
