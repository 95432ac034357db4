"""Project speech features to the audio tokens that the talking-avatar transformer attends to, for each latent frame."""

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.streaming.weights import Weights

_GROUP = 4  # frames per latent frame, after the first
_EPS = 1e-5


def windows(features: Tensor, first: int, count: int, width: int = 5) -> Tensor:
    """A window of features around each of `count` frames, the first at `first` -> [count, width, layers, channels].

    features: [T, layers, channels]; its first and last frame are repeated beyond the ends.
    """
    offsets = torch.arange(width) - width // 2
    frames = torch.arange(first, first + count).unsqueeze(1) + offsets
    return features[frames.clamp(0, len(features) - 1)]


def later_slots(windows: Tensor) -> Tensor:
    """Join the windows of each latent frame after the first: [4 n, width, ...] -> [n, 2 (width // 2 + 1) + 2, ...].

    Of the four windows of a latent frame, the first contributes its first half up to the middle, the last its second
    half from the middle on, and those in between their middle only.
    """
    middle = windows.shape[1] // 2
    first, *between, last = windows.unflatten(0, (-1, _GROUP)).unbind(1)
    middles = [frame[:, middle : middle + 1] for frame in between]
    return torch.cat((first[:, : middle + 1], *middles, last[:, middle:]), 1)


def project_audio(w: Weights, windows: Tensor, tokens: int) -> Tensor:
    """Windows [1 + 4 (F - 1), width, layers, channels] -> [F, tokens, audio_dim]."""
    hidden = [w.linear("audio_proj.proj1", windows[:1].flatten(1))]
    if len(windows) > 1:
        hidden.append(w.linear("audio_proj.proj1_vf", later_slots(windows[1:]).flatten(1)))
    x = F.relu(w.linear("audio_proj.proj2", F.relu(torch.cat(hidden))))
    x = w.linear("audio_proj.proj3", x).unflatten(1, (tokens, -1))
    weight, bias = w.dense("audio_proj.norm.weight"), w.dense("audio_proj.norm.bias")
    return F.layer_norm(x.float(), (x.shape[-1],), weight, bias, _EPS).to(windows.dtype)
