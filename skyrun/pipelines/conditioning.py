"""What a window's noise is denoised beside: text, clean frames, a picture's tokens, speech, motion."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skyrun.models.dit import Context, DiT, Rope, TimeEmbedding


@dataclass(frozen=True)
class Motion:
    """Latents [16, M, h, w] that a window begins with: at every step they get the noise that the others have left.

    noise [steps + 1, 16, M, h, w]: drawn for the start and for after every step.
    """

    latents: Tensor
    noise: Tensor

    def held(self, sample: Tensor, step: int, level: float) -> Tensor:
        """The sample after `step` steps, its first frames at the noise level, 0 to 1."""
        first = (1 - level) * self.latents.to(sample.device) + level * self.noise[step].to(sample.device)
        return torch.cat((first, sample[:, first.shape[1] :]), 1)


@dataclass(frozen=True)
class Condition:
    """Tensors may be anywhere.

    text: embedding [n, text_dim]. before, after: latents [16, P, h, w] that stand beside the noisy ones in time.
    clean: these have timestep 0, not that of the noise. after_position: where `after` begins on the time axis, None:
    where the noise ends. channels: [C, F, h, w], more channels of every frame. image: tokens [n, image_dim]. audio:
    windows of speech [frames, 5, layers, channels].
    """

    text: Tensor
    before: Tensor | None = None
    after: Tensor | None = None
    clean: bool = False
    after_position: int | None = None
    channels: Tensor | None = None
    image: Tensor | None = None
    audio: Tensor | None = None
    motion: Motion | None = None

    def on(self, device: torch.device) -> "Condition":
        """The same, what is read at every step on the device."""
        before, after, channels = (
            None if t is None else t.to(device) for t in (self.before, self.after, self.channels)
        )
        return replace(self, before=before, after=after, channels=channels)

    def context(self, dit: DiT) -> Context:
        """What every token attends to."""
        return Context(
            dit.embed_text(self.text),
            None if self.image is None else dit.embed_image(self.image),
            None if self.audio is None else dit.embed_audio(self.audio),
        )

    def sequence(self, latents: Tensor) -> Tensor:
        """The noisy latents [16, F, h, w] among all that the transformer sees."""
        if self.channels is not None:
            return torch.cat((latents, self.channels))
        return torch.cat([part for part in (self.before, latents, self.after) if part is not None], 1)

    def noisy(self, latents: Tensor) -> slice:
        """Where in the sequence the noisy frames are."""
        first = _frames(self.before)
        return slice(first, first + latents.shape[1])

    def rope(self, dit: DiT, latents: Tensor) -> Rope:
        """Rotary table of the sequence."""
        end = self.noisy(latents).stop
        start = end if self.after_position is None else self.after_position
        positions = [*range(end), *range(start, start + _frames(self.after))]
        return dit.rope(self.sequence(latents), positions)

    def times(self, dit: DiT, timesteps: Sequence[float], latents: Tensor) -> list[list[TimeEmbedding]]:
        """For every step the times of the sequence's frames. All at once: the same numbers in every run."""
        noisy, frames = self.noisy(latents), self.sequence(latents).shape[1]
        if not self.clean:
            return [[time] * frames for time in dit.embed_times(timesteps)]
        *times, still = dit.embed_times([*timesteps, 0.0])
        before, after = [still] * noisy.start, [still] * (frames - noisy.stop)
        return [[*before, *[time] * latents.shape[1], *after] for time in times]


def _frames(latents: Tensor | None) -> int:
    return 0 if latents is None else latents.shape[1]
