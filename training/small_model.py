"""Train the small model that skyrun carries: `python -m training.small_model -o DIR`.

Stages follow one another; each saves its state, so that the command goes on where it stopped. The checkpoint is
written to DIR/checkpoint with report.json beside its folders, sheets of pictures to DIR.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skyrun.kernels.files.atomic import replacing
from training.autoencoder import new_autoencoder
from training.autoencoder_stages import clips_stage, pictures_stage
from training.denoising import compile_blocks, denoising_stage
from training.export import write_checkpoint
from training.latents import Clips, Latents, draw_latents
from training.report import write_report
from training.stage import Weights, run_stage
from training.text import new_text_encoder
from training.transformer import new_transformer


@dataclass(frozen=True)
class Recipe:
    """How long each stage is.

    judged: how many clips of each kind the report is about. save_every: after how many steps a stage saves its state.
    threads: of torch, on which the order of sums depends. compiled: whether the transformer's block is compiled, which
    takes a minute.
    """

    pictures: int = 4500
    latents: int = 8000
    denoising: int = 13000
    clips: int = 800
    judged: int = 72
    save_every: int = 100
    threads: int = 2
    compiled: bool = True


def train(folder: Path, recipe: Recipe, seed: int = 0) -> None:
    """Train all parts and write the checkpoint and its report. Goes on from the states that the folder has."""
    torch.set_num_threads(recipe.threads)
    folder.mkdir(parents=True, exist_ok=True)
    report: list[dict[str, Any]] = []
    vae = new_autoencoder(seed)
    run_stage(pictures_stage(vae, recipe.pictures), folder, seed, report, recipe.save_every)
    latents = _latents(folder / "latents.pt", vae, recipe.latents, seed)
    dit, encoder = new_transformer(seed + 1), new_text_encoder(seed + 2)
    if recipe.compiled:
        compile_blocks(dit, encoder)
    stage = denoising_stage(dit, encoder, latents, recipe.denoising)
    run_stage(stage, folder, seed, report, recipe.save_every)
    run_stage(clips_stage(vae, recipe.clips), folder, seed, report, recipe.save_every)
    write_checkpoint(folder / "checkpoint", dit, encoder, vae, latents)
    write_report(folder, dit, encoder, vae, latents, recipe.judged, report)


def _latents(path: Path, vae: Weights, count: int, seed: int) -> Latents:
    """The transformer's data, from the file if it has been drawn before."""
    if not path.exists():
        started = time.monotonic()
        drawn = draw_latents(vae, count, seed)
        with replacing(path) as partial:
            torch.save(drawn, partial)
        print(f"latents: {count} clips, {time.monotonic() - started:.0f} s", flush=True)
    with torch.serialization.safe_globals([Latents, Clips]):
        loaded: Latents = torch.load(path, weights_only=True)
    return loaded


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.small_model", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.output, Recipe(), arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
