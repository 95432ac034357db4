"""The transformer's training data: clips and their references as latents, encoded once."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.autoencoder import Autoencoder
from training.autoencoder_stages import as_tensor
from training.clips import FRAMES, SIZES, TRAINED, draw_clip
from training.stage import Weights, random_of

_SIZE_SHARES = (0.15, 0.7, 0.15)  # in the order of SIZES
_FRAME_SHARES = (0.03, 0.02, 0.85, 0.02, 0.03, 0.02, 0.03)  # in the order of FRAMES
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
    """All buckets, and the statistics of their frames by channel, [16] each."""

    buckets: list[Bucket]
    mean: Tensor
    std: Tensor

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, F, h, w] with mean 0 and standard deviation 1."""
        return (latents - self.mean.view(-1, 1, 1, 1)) / self.std.view(-1, 1, 1, 1)


@torch.no_grad()
def draw_latents(weights: Weights, count: int, seed: int) -> Latents:
    """Draw and encode `count` clips; of a clip only the frames that are a latent frame's last are drawn."""
    coder, drawn = Autoencoder(weights), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a clip is too small for more
    for number in range(count):
        random = random_of(seed, "latents", number)
        size = SIZES[random.draw.choice(len(SIZES), p=_SIZE_SHARES)]
        frames = FRAMES[random.draw.choice(len(FRAMES), p=_FRAME_SHARES)]
        topic = TRAINED[random.draw.integers(len(TRAINED))]
        clip = draw_clip(topic, size, frames, random.draw, step=4)
        pictures = as_tensor(np.concatenate((clip.frames, np.stack(clip.references))).astype(np.float32))
        mean, log_variance = (part.transpose(0, 1) for part in coder.encode(pictures))
        latent, references = len(clip.frames), len(clip.references)
        both = torch.stack((mean[:, latent:], (0.5 * log_variance[:, latent:]).exp()))
        padded = F.pad(both, (0, 0, 0, 0, 0, 2 - references))
        drawn.setdefault((size, frames), []).append((clip.prompt, mean[:, :latent].half(), padded.half(), references))
    torch.set_num_threads(threads)
    buckets = [_bucket(drawn[key]) for key in sorted(drawn)]
    total = torch.cat([bucket.frames.float().transpose(0, 1).flatten(1) for bucket in buckets], 1)
    return Latents(buckets, total.mean(1), total.std(1).clamp_min(_LEAST_STD))


def _bucket(clips: list[tuple[str, Tensor, Tensor, int]]) -> Bucket:
    prompts, frames, references, counts = zip(*clips, strict=True)
    return Bucket(list(prompts), torch.stack(frames), torch.stack(references), torch.tensor(counts))
