"""What the denoising of a window is conditioned on: text, given frames, image tokens, speech, motion frames."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skyrun.kernels.selection import tiles_for
from skyrun.models.dit import Context, DiT, Rope
from skyrun.models.dit.spans import TimeEmbedding
from skyrun.models.dit.tile_order import Frames, TileOrder, tile_order
from skyrun.pipelines.state import RunState
from skyrun.planning.job import Job

HISTORY_TIME = 20.0  # timestep that frames of an earlier window are noised to by diffusion forcing


@dataclass(frozen=True)
class Motion:
    """Motion frames, which a window begins with. At every step they are noised to the current sigma.

    latents: [16, M, h, w]. noise: [steps + 1, 16, M, h, w], one sample for the start and one for after every step.
    """

    latents: Tensor
    noise: Tensor

    def held(self, sample: Tensor, step: int, sigma: float) -> Tensor:
        """The sample after `step` steps with its first frames replaced by the motion frames, noised to `sigma`."""
        first = (1 - sigma) * self.latents.to(sample.device) + sigma * self.noise[step].to(sample.device)
        return torch.cat((first, sample[:, first.shape[1] :]), 1)


@dataclass(frozen=True)
class Condition:
    """What a window is conditioned on. Tensors may be on any device.

    text: embedding [n, text_dim]. before, after: latents [16, P, h, w] that precede or follow the noisy ones in time.
    clean: whether these have timestep 0 (with `noise`: a low one) instead of the noisy frames' timestep. noise: [steps,
    16, P, h, w], what `before` is noised with in each step, slightly. after_position: the position of `after` on the
    time axis; None puts it directly after the noisy frames. channels: [C, F, h, w], concatenated to the latents of
    every frame. image: tokens [n, image_dim]. audio: windows of speech features [frames, 5, layers, channels].
    motion: frames that the window begins with. fps: the frame rate, for a transformer that is told. negative: embedding
    of the negative prompt, where there is guidance. guidance: scale of classifier-free guidance; 1 does without. nag:
    scale of normalized attention guidance, or None.
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
    noise: Tensor | None = None
    fps: int | None = None
    negative: Tensor | None = None
    guidance: float = 1.0
    nag: float | None = None

    def on(self, device: torch.device) -> "Condition":
        """The same condition, with the tensors that every step reads on the device."""
        before, after, channels = (
            None if t is None else t.to(device) for t in (self.before, self.after, self.channels)
        )
        return replace(self, before=before, after=after, channels=channels)

    def on_host(self) -> "Condition":
        """The same condition with all tensors on the host, to be handed over to another process."""
        moved: dict[str, Any] = {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.motion is not None:
            moved["motion"] = Motion(self.motion.latents.cpu(), self.motion.noise.cpu())
        return replace(self, **moved)

    def contexts(self, dit: DiT) -> list[Context]:
        """What every token attends to by cross-attention: with the prompt, and without it for classifier-free guidance.

        Normalized attention guidance is for the former alone, as in the code of its authors.
        """
        context = Context(
            dit.embed_text(self.text),
            None if self.image is None else dit.embed_image(self.image),
            None if self.audio is None else dit.embed_audio(self.audio),
        )
        if self.negative is None:
            return [context]
        negative = dit.embed_text(self.negative)
        first = context if self.nag is None else replace(context, avoided=negative, nag=self.nag)
        return [first, *([] if self.guidance == 1 else [replace(context, text=negative)])]

    def guided(self, velocities: list[Tensor]) -> Tensor:
        """The velocity with classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598)."""
        velocity, *others = velocities
        return others[0] + self.guidance * (velocity - others[0]) if others else velocity

    def sequence(self, latents: Tensor, step: int = 0) -> Tensor:
        """The transformer's input: the noisy latents [16, F, h, w] joined with the given latents or channels."""
        if self.channels is not None:
            return torch.cat((latents, self.channels))
        before = self.before
        if before is not None and self.noise is not None:
            share = HISTORY_TIME / 1000
            before = (1 - share) * before + share * self.noise[step].to(before.device)
        return torch.cat([part for part in (before, latents, self.after) if part is not None], 1)

    def noisy(self, latents: Tensor) -> slice:
        """The range of the noisy frames in the sequence."""
        first = _frames(self.before)
        return slice(first, first + latents.shape[1])

    def rope(self, dit: DiT, latents: Tensor, order: TileOrder) -> Rope:
        """The rotary table of the sequence, in the order of its tokens."""
        end = self.noisy(latents).stop
        start = end if self.after_position is None else self.after_position
        positions = [*range(end), *range(start, start + _frames(self.after))]
        cosines, sines = dit.rope(self.sequence(latents), positions)
        return order.arranged(cosines), order.arranged(sines)

    def order(self, dit: DiT, latents: Tensor, times: Sequence[Sequence[TimeEmbedding]]) -> TileOrder:
        """The order of the sequence's tokens.

        Frames are mixed only with others that have the same time in every step. The first frame, given ones and
        references, which have nothing to do with each other, are apart; every query reads them.

        Args:
            dit: the transformer.
            latents: the noisy latents [16, F, h, w].
            times: for every step those of the sequence's frames.
        """
        noisy, frames = self.noisy(latents), len(times[0])
        rows, cols = latents.shape[2] // 2, latents.shape[3] // 2
        first = max(1, noisy.start)
        parts = [
            Frames(first, True),
            *self._alike(times, first, noisy.stop),
            *[Frames(1, True)] * (frames - noisy.stop),
        ]
        return tile_order(parts, rows, cols, tiles_for(frames * rows * cols, dit.device))

    @staticmethod
    def _alike(times: Sequence[Sequence[TimeEmbedding]], start: int, stop: int) -> list[Frames]:
        """Runs of frames that share their time in every step."""
        edges = [n for n in range(start + 1, stop) if any(row[n] is not row[n - 1] for row in times)]
        ends = zip([start, *edges], [*edges, stop], strict=True)
        return [Frames(end - first) for first, end in ends if end > first]

    def times(self, dit: DiT, timesteps: Sequence[Any], latents: Tensor) -> list[list[TimeEmbedding]]:
        """For every step the time embeddings of the sequence's frames.

        All steps are embedded in one call, so that a resumed run gets the same values bit for bit.
        """
        noisy, frames = self.noisy(latents), self.sequence(latents).shape[1]
        if isinstance(timesteps[0], tuple):
            return self._times_of_frames(dit, timesteps, noisy.start)
        if not self.clean:
            return [[time] * frames for time in dit.embed_times(timesteps, self.fps)]
        given = 0.0 if self.noise is None else HISTORY_TIME
        *times, zero = dit.embed_times([*timesteps, given], self.fps)
        before, after = [zero] * noisy.start, [zero] * (frames - noisy.stop)
        return [[*before, *[time] * latents.shape[1], *after] for time in times]

    def _times_of_frames(
        self, dit: DiT, timesteps: Sequence[tuple[float, ...]], before: int
    ) -> list[list[TimeEmbedding]]:
        given = 0.0 if self.noise is None else HISTORY_TIME
        distinct = sorted({given, *(time for row in timesteps for time in row)})
        known = dict(zip(distinct, dit.embed_times(distinct, self.fps), strict=True))
        return [[*[known[given]] * before, *(known[time] for time in row)] for row in timesteps]


def condition_of(job: Job, state: RunState, *, text: str = "text", **given: Any) -> Condition:
    """The condition on the encoded prompt of that name, on the negative one, and on what else is given."""
    request, negative = job.request, state.encoded.get("negative")
    guidance = 1.0 if request.guidance is None else request.guidance
    return Condition(state.encoded[text], negative=negative, guidance=guidance, nag=request.nag, **given)


def _frames(latents: Tensor | None) -> int:
    return 0 if latents is None else latents.shape[1]
