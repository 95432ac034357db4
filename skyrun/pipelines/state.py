"""What a run has made so far, on the host: what a failed stage, or another process, goes on from."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from skyrun.pipelines.samplers import Sampler

_CPU = torch.device("cpu")


@dataclass
class RunState:
    """Stages fill it in order; what is there is finished. All of it is on the host, whatever happens to the device.

    encoded: what all of the clip is made from, by name: embeddings of prompts, latents of pictures or video. window:
    how many windows are finished. carried: what these hand on to the next, by name. latents: of that one [16, F, h, w]
    at the level of noise that the sampler has reached. groups: latent frames of it of which frames were handed out.
    """

    encoded: dict[str, Tensor] = field(default_factory=dict)
    window: int = 0
    carried: dict[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    sampler: Sampler | None = None
    groups: int = 0

    @property
    def steps(self) -> int:
        """Denoising steps of the window that are finished."""
        return self.sampler.index if self.sampler is not None else 0

    @property
    def mark(self) -> tuple[int, ...]:
        """Grows with everything that is finished."""
        return len(self.encoded), self.window, self.steps, self.groups

    def finish_step(self, latents: Tensor, sampler: Sampler) -> None:
        """Take over the outcome of a step: copies, so that a step that fails half-way changes nothing here."""
        self.latents, self.sampler = latents.to(_CPU), sampler.on(_CPU)

    def finish_window(self, **carried: Tensor) -> None:
        """All frames of the window are handed out; the next begins with what is carried on."""
        self.window, self.carried = self.window + 1, carried
        self.latents, self.sampler, self.groups = None, None, 0
