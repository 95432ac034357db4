"""Match the colors of frames to an image: mean and standard deviation of each CIE Lab channel, as upstream does.

The conversions are those of kornia, for sRGB and D65.
"""

import torch
from torch import Tensor

_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_TO_RGB = (
    (3.24048134, -1.53715152, -0.49853633),
    (-0.96925495, 1.87599000, 0.04155593),
    (0.05564664, -0.20404134, 1.05731107),
)
_WHITE = (0.95047, 1.0, 1.08883)
_BEND, _SLOPE, _OFFSET = 0.008856, 7.787, 4 / 29  # of the line that replaces the cube root near black
_BEND_BACK = 0.2068966
_TINY = 1e-6  # lower bound of a standard deviation, which is divided by


def match_colors(frames: Tensor, image: Tensor) -> Tensor:
    """Match each of the frames [3, T, H, W] to an image [3, H', W']. Both are float32 in [-1, 1]."""
    mean, std = _statistics(_rgb_to_lab(_unit(image)).flatten(1))
    matched = torch.empty_like(frames)
    for index in range(frames.shape[1]):
        lab = _rgb_to_lab(_unit(frames[:, index]))
        own_mean, own_std = _statistics(lab.flatten(1))
        lab = (lab - own_mean[:, None, None]) / own_std[:, None, None] * std[:, None, None] + mean[:, None, None]
        matched[:, index] = _lab_to_rgb(lab).clamp(0, 1) * 2 - 1
    return matched


def _unit(pixels: Tensor) -> Tensor:
    return ((pixels + 1) / 2).clamp(0, 1)


def _statistics(lab: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each row of [3, n]."""
    return lab.mean(1), lab.std(1, correction=0).clamp_min(_TINY)


def _rgb_to_lab(rgb: Tensor) -> Tensor:
    """[3, H, W] in [0, 1] -> lightness from 0 to 100, a and b."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).pow(2.4), rgb / 12.92)
    xyz = _mixed(linear, _TO_XYZ) / _column(_WHITE, rgb)
    x, y, z = torch.where(xyz > _BEND, xyz.clamp_min(_BEND).pow(1 / 3), _SLOPE * xyz + _OFFSET)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)))


def _lab_to_rgb(lab: Tensor) -> Tensor:
    lightness, a, b = lab
    y = (lightness + 16) / 116
    roots = torch.stack((y + a / 500, y, (y - b / 200).clamp_min(0)))
    xyz = torch.where(roots > _BEND_BACK, roots.pow(3), (roots - _OFFSET) / _SLOPE) * _column(_WHITE, lab)
    linear = _mixed(xyz, _TO_RGB)
    bright = 1.055 * linear.clamp_min(0.0031308).pow(1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, bright, 12.92 * linear)


def _mixed(channels: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    return torch.einsum("ij,jhw->ihw", torch.tensor(matrix, device=channels.device), channels)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).view(3, 1, 1)
