"""The transformer's training data: clips and their references as latents, encoded once."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.autoencoder import Autoencoder
from training.autoencoder_stages import as_tensor
from training.clips import FRAMES, SIZE, TRAINED, Clip, draw_clip
from training.stage import Weights, random_of

# A few topics at one place, so that the words for motions are learned before what a prompt leaves open.
_EASY = [
    topic
    for topic in TRAINED
    if topic.motion in ("right", "left", "up", "down")
    and topic.shape in ("ball", "square", "star")
    and topic.scene in ("white", "sea", "grass")
]
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
    """All clips, easy ones that are learned first, and the statistics of all frames by channel, [16] each."""

    all: Clips
    easy: Clips
    mean: Tensor
    std: Tensor

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, F, h, w] with mean 0 and standard deviation 1."""
        return (latents - self.mean.view(-1, 1, 1, 1)) / self.std.view(-1, 1, 1, 1)


@torch.no_grad()
def draw_latents(weights: Weights, count: int, seed: int) -> Latents:
    """Draw and encode `count` clips, and a quarter as many easy ones."""
    coder, drawn, easy = Autoencoder(weights), [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a clip is too small for more
    for number in range(count):
        draw = random_of(seed, "latents", number).draw
        topic = TRAINED[draw.integers(len(TRAINED))]
        drawn.append(_encoded(draw_clip(topic, SIZE, FRAMES, draw, 4), coder))
    for number in range(max(1, count // 4)):
        draw = random_of(seed, "easy", number).draw
        topic = _EASY[draw.integers(len(_EASY))]
        easy.append(_encoded(draw_clip(topic, SIZE, FRAMES, draw, 4, shares=(0, 1, 0)), coder))
    torch.set_num_threads(threads)
    joined = _joined(drawn)
    total = joined.frames.float().transpose(0, 1).flatten(1)
    return Latents(joined, _joined(easy), total.mean(1), total.std(1).clamp_min(_LEAST_STD))


def _encoded(clip: Clip, coder: Autoencoder) -> tuple[str, Tensor, Tensor, int]:
    """Prompt, latents of frames and references, and how many references there are.

    Of the clip only the frames are drawn that are a latent frame's last.
    """
    pictures = as_tensor(np.concatenate((clip.frames, np.stack(clip.references))))
    mean, log_variance = (part.transpose(0, 1) for part in coder.encode(pictures))
    latent, references = len(clip.frames), len(clip.references)
    both = torch.stack((mean[:, latent:], (0.5 * log_variance[:, latent:]).exp()))
    padded = F.pad(both, (0, 0, 0, 0, 0, 2 - references))
    return clip.prompt, mean[:, :latent].half(), padded.half(), references


def _joined(clips: list[tuple[str, Tensor, Tensor, int]]) -> Clips:
    prompts, frames, references, counts = zip(*clips, strict=True)
    return Clips(list(prompts), torch.stack(frames), torch.stack(references), torch.tensor(counts))
