"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): steps along momentum that is made orthogonal."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The first three iterations of Polar Express (Amsel et al. 2025, arXiv:2505.16932).
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with all singular values near 1 and the same singular vectors."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.transpose(1, 2)
    x = x / (1.01 * x.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    for a, b, c in _POLAR_EXPRESS:
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x if wide else x.transpose(1, 2)


class Muon:
    """An optimizer for weights that act as matrices [out, rest]. Weights of one shape are updated together.

    dtype: in which matrices are made orthogonal.
    """

    def __init__(self, weights: Iterable[Tensor], rate: float, dtype: torch.dtype, momentum: float = 0.95) -> None:
        self._rate, self._dtype, self._momentum = rate, dtype, momentum
        self._groups: dict[tuple[int, int], list[Tensor]] = {}
        for weight in weights:
            self._groups.setdefault((len(weight), weight[0].numel()), []).append(weight)
        self._averages = [torch.zeros(len(group), *shape) for shape, group in self._groups.items()]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at `factor` times the learning rate."""
        for (shape, group), average in zip(self._groups.items(), self._averages, strict=True):
            gradient = torch.stack([_gradient(weight).reshape(shape) for weight in group])
            average.mul_(self._momentum).add_(gradient)
            change = orthogonal((gradient + self._momentum * average).to(self._dtype)).float()
            change *= max(1, shape[0] / shape[1]) ** 0.5
            for weight, matrix in zip(group, change, strict=True):
                weight.sub_(matrix.view_as(weight), alpha=self._rate * factor)

    def zero_grad(self) -> None:
        for weight in (weight for group in self._groups.values() for weight in group):
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)


class Optimizer:
    """Muon for some weights and AdamW for the others, which have their gradient's norm limited to 1."""

    def __init__(
        self,
        weights: Iterable[Tensor],
        is_matrix: Callable[[Tensor], bool],
        muon: float,
        adam: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        weights = list(weights)
        self._others = [weight for weight in weights if not is_matrix(weight)]
        self._muon = Muon([weight for weight in weights if is_matrix(weight)], muon, dtype)
        self._adam = torch.optim.AdamW(self._others, lr=adam, betas=(0.9, 0.95), weight_decay=0.0)
        self._rate = adam

    def step(self, factor: float) -> None:
        """One step at `factor` times both learning rates."""
        torch.nn.utils.clip_grad_norm_(self._others, 1.0)
        for group in self._adam.param_groups:
            group["lr"] = self._rate * factor
        self._adam.step()
        self._muon.step(factor)
        self._adam.zero_grad()
        self._muon.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self._adam.state_dict(), "muon": self._muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adam.load_state_dict(state["adam"])
        self._muon.load_state_dict(state["muon"])


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
