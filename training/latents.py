"""The transformer's training data: clips and their references as latents, encoded once."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.autoencoder import Autoencoder
from training.autoencoder_stages import as_tensor
from training.clips import MOST, SIZES, TRAINED, USUAL, Clip, draw_clip
from training.stage import Weights, random_of

# A few topics at one place, so that the words for motions are learned before what a prompt leaves open.
_EASY = [
    topic
    for topic in TRAINED
    if topic.motion in ("right", "left", "up", "down")
    and topic.shape in ("ball", "square", "star")
    and topic.scene in ("white", "sea", "grass")
]
_SHARES = (0.5, 0.25, 0.25)  # of clips of each size
_BATCH = 8  # clips that are encoded at a time
_LEAST_STD = 0.5  # a channel that holds little is not blown up to pure noise


@dataclass
class Clips:
    """Clips of one size and length, not normalised.

    prompts: one each. frames: [n, 16, F, h, w]. references: mean and standard deviation of two, zeros where there is
    none, [n, 2, 16, 2, h, w]. counts: how many references there are, [n].
    """

    prompts: list[str]
    frames: Tensor
    references: Tensor
    counts: Tensor


@dataclass
class Latents:
    """Clips of every size, easy ones that are learned first, and the statistics by channel, [16] each.

    sizes: the longest clips; a shorter one is the end of a longer one. easy: of the usual length.
    """

    sizes: list[Clips]
    easy: Clips
    mean: Tensor
    std: Tensor

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, F, h, w] with mean 0 and standard deviation 1."""
        return (latents - self.mean.view(-1, 1, 1, 1)) / self.std.view(-1, 1, 1, 1)


def draw_latents(weights: Weights, count: int, seed: int) -> Latents:
    """Draw and encode `count` clips, and an eighth as many easy ones."""
    coder, sizes = Autoencoder(weights), []
    for size, share in zip(SIZES, _SHARES, strict=True):
        name = "latents {}x{}".format(*size)
        drawn = (
            draw_clip(TRAINED[draw.integers(len(TRAINED))], size, MOST, draw, 4)
            for draw in (random_of(seed, name, number).draw for number in range(max(1, round(share * count))))
        )
        sizes.append(_encoded(drawn, coder))
    easy = (
        draw_clip(_EASY[draw.integers(len(_EASY))], SIZES[0], USUAL, draw, 4, shares=(0, 1, 0))
        for draw in (random_of(seed, "easy", number).draw for number in range(max(1, count // 8)))
    )
    total = sizes[0].frames.float().transpose(0, 1).flatten(1)
    return Latents(sizes, _encoded(easy, coder), total.mean(1), total.std(1).clamp_min(_LEAST_STD))


@torch.no_grad()
def _encoded(clips: Iterable[Clip], coder: Autoencoder) -> Clips:
    """Clips of one size and length, of which only those frames are drawn that are a latent frame's last."""
    left, encoded = iter(clips), []
    while some := list(islice(left, _BATCH)):
        pictures = as_tensor(
            np.concatenate([np.concatenate((clip.frames, np.stack(clip.references))) for clip in some])
        )
        lengths = [len(clip.frames) + len(clip.references) for clip in some]
        both = [part.split(lengths) for part in coder.encode(pictures)]
        encoded += [_split(clip, mean, log_variance) for clip, mean, log_variance in zip(some, *both, strict=True)]
    return _joined(encoded)


def _split(clip: Clip, mean: Tensor, log_variance: Tensor) -> tuple[str, Tensor, Tensor, int]:
    """Prompt, latents of frames and references, and how many references there are. Of pictures [F + n, 16, h, w]."""
    latent, references = len(clip.frames), len(clip.references)
    both = torch.stack((mean[latent:], (0.5 * log_variance[latent:]).exp())).transpose(1, 2)
    padded = F.pad(both, (0, 0, 0, 0, 0, 2 - references))
    return clip.prompt, mean[:latent].transpose(0, 1).half(), padded.half(), references


def _joined(clips: list[tuple[str, Tensor, Tensor, int]]) -> Clips:
    prompts, frames, references, counts = zip(*clips, strict=True)
    return Clips(list(prompts), torch.stack(frames), torch.stack(references), torch.tensor(counts))
