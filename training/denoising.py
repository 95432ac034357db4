"""The stage that trains transformer and text encoder by flow matching, and a sampler to look at what they learned."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from skyrun.pipelines.samplers import UniPC
from skyrun.tasks import TASKS
from skyrun.tasks.skyreels_v3 import MAX_REFERENCES
from skyrun.tasks.windows import FRAMES_PER_LATENT
from training import transformer
from training.clips import LEAST, MOST, USUAL
from training.latents import Clips, Latents
from training.muon import Optimizer
from training.stage import Losses, Random, Stage, Weights
from training.text import encode_text, token_ids, unigram
from training.transformer import velocity

_TOKENS = 1200  # of a step's batch, about
_EASY = 0.1  # share of the steps that only see easy clips
_ONE_SIZE = 0.4  # and of those after which there are other sizes and lengths
_LENGTHS = range((LEAST - 1) // FRAMES_PER_LATENT + 1, (MOST - 1) // FRAMES_PER_LATENT + 2)  # latent frames
_USUAL = (USUAL - 1) // FRAMES_PER_LATENT + 1
_LARGEST_SIGMA = 0.999
_BINS = (0.6, 0.85, 0.95)  # the loss is reported for sigmas below and above each


def denoising_stage(dit: Weights, encoder: Weights, latents: Latents, steps: int) -> Stage:
    """Train to predict noise - clip from (1 - sigma) clip + sigma noise, a prompt and references."""
    tokenizer = unigram().tokenizer()

    def loss(step: int, random: Random) -> tuple[Tensor, Losses]:
        clips, length = _lesson(latents, step / steps, random)
        picked = random.draw.integers(len(clips.prompts), size=_batch(clips, length))
        prompts = [clips.prompts[index] for index in picked]
        clean, after = _pictures(clips, length, torch.from_numpy(picked), latents, random)
        sigma = _sigmas(len(picked), random)
        noise, share = random.normal(clean), sigma.view(-1, 1, 1, 1, 1)
        noisy = torch.cat(((1 - share) * clean + share * noise, after), 2)
        context, scores = encode_text(encoder, token_ids(tokenizer, prompts))
        made = velocity(dit, noisy, (1000 * sigma).floor(), context, scores, clean.shape[2])
        each = (made - (noise - clean)).square().mean((1, 2, 3, 4))
        return each.mean(), _by_sigma(sigma, each.detach())

    trained = {f"transformer.{name}": weight for name, weight in dit.items()}
    trained |= {f"text_encoder.{name}": weight for name, weight in encoder.items()}
    matrices = {id(weight) for name, weight in dit.items() if name.startswith("blocks") and weight.dim() == 2}
    optimizer = Optimizer(trained.values(), lambda weight: id(weight) in matrices, 0.02, 1.5e-3, torch.bfloat16)
    return Stage("denoising", steps, trained, optimizer, loss, warm_up=60)


@torch.no_grad()
def sample(
    dit: Weights, encoder: Weights, prompts: Sequence[str], references: Tensor, noise: Tensor, tokenizer: Tokenizer
) -> Tensor:
    """Clips from noise [B, 16, F, h, w] and normalised references [B, 16, 4, h, w], by the runtime's sampler."""
    context, scores = encode_text(encoder, token_ids(tokenizer, prompts))
    spec = TASKS["r2v"]
    sampler, latents = UniPC(spec.steps, spec.shift), noise
    for timestep in sampler.timesteps:
        times = torch.full((len(noise),), float(timestep))
        made = velocity(dit, torch.cat((latents, references), 2), times, context, scores, noise.shape[2])
        latents = sampler.step(made, latents)
    return latents


def _lesson(latents: Latents, share: float, random: Random) -> tuple[Clips, int]:
    """What is learned after that share of the steps: clips of one size, and how many latent frames of their ends."""
    if share < _ONE_SIZE:
        return (latents.easy if share < _EASY else latents.sizes[0]), _USUAL
    return latents.sizes[random.draw.integers(len(latents.sizes))], int(random.draw.choice(_LENGTHS))


def _batch(clips: Clips, length: int) -> int:
    height, width = clips.frames.shape[3:]
    return round(_TOKENS / ((length + MAX_REFERENCES) * height * width / 4))


def _pictures(clips: Clips, length: int, picked: Tensor, latents: Latents, random: Random) -> tuple[Tensor, Tensor]:
    """The last `length` latent frames of the picked clips, and samples of their references.

    Zeros follow for references that are missing.
    """
    mean, std = clips.references[picked].float().unbind(1)
    references = latents.normalised(mean + std * random.normal(mean))
    there = torch.arange(references.shape[2]) < clips.counts[picked, None]
    references = references * there[:, None, :, None, None]
    missing = MAX_REFERENCES - references.shape[2]
    return latents.normalised(clips.frames[picked, :, -length:].float()), F.pad(references, (0, 0, 0, 0, 0, missing))


def _sigmas(count: int, random: Random) -> Tensor:
    """One sigma from each of `count` equal parts of the schedule that clips are sampled with."""
    even = _LARGEST_SIGMA * (torch.arange(count) + torch.rand(count, generator=random.noise)) / count
    shift = TASKS["r2v"].shift
    return shift * even / (1 + (shift - 1) * even)


def _by_sigma(sigma: Tensor, each: Tensor) -> Losses:
    bins = torch.bucketize(sigma, torch.tensor(_BINS))
    names = [f"sigma_to_{edge}" for edge in (*_BINS, 1)]
    return {"loss": each.mean().item()} | {
        name: each[bins == number].mean().item() for number, name in enumerate(names) if (bins == number).any()
    }


def compile_blocks(dit: Weights, encoder: Weights) -> None:
    """Compile the transformer's block, always on the same two shapes: the code depends on those that come first."""
    transformer.block = torch.compile(transformer.block, dynamic=True)
    ids = token_ids(unigram().tokenizer(), ["a red ball spins."])
    for rows, columns in ((8, 8), (6, 10)):
        context, scores = encode_text(encoder, ids.expand(8, -1))
        made = velocity(dit, torch.zeros(8, 16, 9, rows, columns), torch.zeros(8), context, scores, 5)
        made.sum().backward()
    for weight in (*dit.values(), *encoder.values()):
        weight.grad = None
