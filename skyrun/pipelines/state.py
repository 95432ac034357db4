"""What a run has made so far, on the host: what a failed stage, or another process, continues from."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from skyrun.models.dit.sparse import Learned
from skyrun.pipelines.samplers import Sampler

_CPU = torch.device("cpu")


@dataclass
class RunState:
    """What is finished of a run. Stages fill it in order. All tensors are on the host, so that they survive the device.

    encoded: inputs of the whole clip by name: embeddings of prompts, latents of images or video. window: how many
    windows are finished. carried: tensors by name that the last finished window passes to the next. latents: of the
    current window, [16, F, h, w], at the sigma that the sampler has reached. groups: how many groups of frames of the
    current window were yielded; each group is one latent frame. learned: what attention may skip.
    """

    encoded: dict[str, Tensor] = field(default_factory=dict)
    window: int = 0
    carried: dict[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    sampler: Sampler | None = None
    groups: int = 0
    learned: Learned = field(default_factory=Learned)

    @property
    def steps(self) -> int:
        """Finished denoising steps of the current window."""
        return self.sampler.index if self.sampler is not None else 0

    @property
    def mark(self) -> tuple[int, ...]:
        """A tuple that grows whenever anything is finished."""
        return len(self.encoded), self.window, self.steps, self.groups

    def finish_step(self, latents: Tensor, sampler: Sampler, learned: Learned) -> None:
        """Store a step's results, the latents on the host and a copy of the sampler.

        A step that fails midway changes nothing here.
        """
        self.latents, self.sampler, self.learned = latents, sampler.on(_CPU), learned

    def finish_window(self, **carried: Tensor) -> None:
        """Record that all frames of the window were yielded. carried: what the next window begins with."""
        self.window, self.carried = self.window + 1, carried
        self.latents, self.sampler, self.groups, self.learned = None, None, 0, self.learned.anew()
