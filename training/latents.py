"""The transformer's training data: clips and their references as latents, encoded once."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.autoencoder import Autoencoder
from training.autoencoder_stages import as_tensor
from training.clips import FRAMES, SIZES, TRAINED, Clip, draw_clip
from training.stage import Weights, random_of

_SIZE_SHARES = (0.4, 0.4, 0.2)  # in the order of SIZES
_FRAME_SHARES = (0.03, 0.02, 0.85, 0.02, 0.03, 0.02, 0.03)  # in the order of FRAMES
_USUAL_FRAMES = 17
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
class Bucket:
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
    """All buckets, and the statistics of their frames by channel, [16] each. easy: what is learned first."""

    buckets: list[Bucket]
    easy: Bucket
    mean: Tensor
    std: Tensor

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, F, h, w] with mean 0 and standard deviation 1."""
        return (latents - self.mean.view(-1, 1, 1, 1)) / self.std.view(-1, 1, 1, 1)


@torch.no_grad()
def draw_latents(weights: Weights, count: int, seed: int) -> Latents:
    """Draw and encode `count` clips, and a quarter as many easy ones."""
    coder, drawn = Autoencoder(weights), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a clip is too small for more
    for number in range(count):
        draw = random_of(seed, "latents", number).draw
        size = SIZES[draw.choice(len(SIZES), p=_SIZE_SHARES)]
        frames = FRAMES[draw.choice(len(FRAMES), p=_FRAME_SHARES)]
        topic = TRAINED[draw.integers(len(TRAINED))]
        drawn.setdefault((size, frames), []).append(_encoded(draw_clip(topic, size, frames, draw, 4), coder))
    easy = []
    for number in range(max(1, count // 4)):
        draw = random_of(seed, "easy", number).draw
        topic = _EASY[draw.integers(len(_EASY))]
        easy.append(_encoded(draw_clip(topic, SIZES[0], _USUAL_FRAMES, draw, 4, places=(0,)), coder))
    torch.set_num_threads(threads)
    buckets = [_bucket(drawn[key]) for key in sorted(drawn)]
    total = torch.cat([bucket.frames.float().transpose(0, 1).flatten(1) for bucket in buckets], 1)
    return Latents(buckets, _bucket(easy), total.mean(1), total.std(1).clamp_min(_LEAST_STD))


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


def _bucket(clips: list[tuple[str, Tensor, Tensor, int]]) -> Bucket:
    prompts, frames, references, counts = zip(*clips, strict=True)
    return Bucket(list(prompts), torch.stack(frames), torch.stack(references), torch.tensor(counts))
