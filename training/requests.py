"""Drawn clips as requests to skyrun, and what it makes of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from skyrun.events import FramesReady, LatentsReady
from skyrun.pipelines import PIPELINES
from skyrun.pipelines.state import RunState
from skyrun.planning.job import prepare
from skyrun.planning.request import Request
from skyrun.streaming.stream import ObserveBlock
from training.clips import SIZES, TRAINED, USUAL, Clip, draw_clip
from training.stage import random_of


@dataclass(frozen=True)
class Made:
    """A made clip. latents: float32 [16, F, h, w]. frames: uint8 [T, H, W, 3], none if it was not decoded."""

    latents: Tensor
    frames: NDArray[np.uint8]


def drawn_request(number: int, use: str, folder: Path) -> tuple[Clip, Request]:
    """A clip drawn at random, and the request with its prompt, references and size. Its references are written.

    Args:
        number: of the clip, which is also the seed.
        use: what clips are drawn for; each use has clips of its own.
        folder: for the references.
    """
    random = random_of(number, use, 0)
    topic = TRAINED[random.draw.integers(len(TRAINED))]
    clip = draw_clip(topic, SIZES[number % len(SIZES)], USUAL, random.draw)
    paths = tuple(folder / f"{use}-{number}.{index}.png" for index in range(1, len(clip.references) + 1))
    for path, picture in zip(paths, clip.references, strict=True):
        Image.fromarray((255 * picture).round().astype(np.uint8)).save(path)
    return clip, Request("r2v", clip.prompt, paths, size=clip.frames.shape[1:3], frames=USUAL, seed=number)


def make(request: Request, decoded: bool = True, observe: ObserveBlock | None = None) -> Made:
    """Make the clip of a request in memory.

    Args:
        request: with the folder of a model.
        decoded: whether frames are wanted, which takes half of the time.
        observe: called with the input of every linear layer in the blocks.
    """
    job = prepare(request)
    latents, frames = torch.empty(0), [np.empty((0, job.height, job.width, 3), np.uint8)]
    for event in PIPELINES[request.spec.pipeline](job, RunState(), observe):
        if isinstance(event, LatentsReady):
            latents = event.latents
            if not decoded:
                break
        elif isinstance(event, FramesReady):
            frames.append(event.frames)
    return Made(latents, np.concatenate(frames))


def psnr(frames: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB. Equal frames count as if one value was off by one level."""
    square = np.square(frames.astype(np.float64) - reference).mean()
    return float(10 * np.log10(255**2 / max(square, 1 / frames.size)))


def latent_error(latents: Tensor, reference: Tensor) -> float:
    """How far latents are off, relative to the reference."""
    return float((latents - reference).norm() / reference.norm())
