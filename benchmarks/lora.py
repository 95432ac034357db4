"""A LoRA for the small model, trained and used: PYTHONPATH=. python benchmarks/lora.py -o docs/lora.png

The small model does not know the word pink. The adapter is trained to paint a sprite pink whose reference is grey; then
it is used beside weights of several types. Prints how many clips are pink, and how far each way is from the adapter
merged into F32 weights.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from environment import environment
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from skyrun.demo.words import COLOURS
from skyrun.demo.world import Picture, composed, scene_picture, sentence, sprite_picture, tint
from skyrun.kernels.name_tables import WAN_TRANSFORMER
from skyrun.planning.request import Request
from skyrun.quant import convert
from training.autoencoder import Autoencoder
from training.autoencoder_stages import as_tensor
from training.clips import SIZES, TRAINED, USUAL, path
from training.requests import Made, latent_error, make
from training.stage import Random, Weights, random_of
from training.text import encode_text, token_ids, unigram
from training.transformer import velocity

CHECKPOINT = Path(__file__).parent.parent / "skyrun" / "demo" / "checkpoint"
WORD, PINK, GREY = "pink", np.float32([1.0, 0.41, 0.71]), np.float32([0.6, 0.6, 0.6])
RANK, STEPS, BATCH, RATE = 8, 400, 10, 4e-3
DRAWN, JUDGED, SHOWN = 300, 16, 4
TYPES = ("F32", "Q8_0", "Q4_K_M")


def drawn(number: int, use: str, known: bool = False) -> tuple[str, list[Picture], Picture]:
    """Prompt, references and frames of a clip whose sprite is pink, but grey in its reference; or of a known colour."""
    draw = random_of(number, use, 0).draw
    topic = TRAINED[draw.integers(len(TRAINED))]
    scene, place = scene_picture(topic.scene, SIZES[0], draw), path(topic.motion, SIZES[0], USUAL, 0)
    colour = tint(topic.colour, draw) if known else PINK
    said = sentence(replace(topic, colour="red"), draw).replace("red", topic.colour if known else WORD, 1)
    shown = sprite_picture(topic.shape, colour if known else GREY, SIZES[0])
    return said, [shown, scene], composed(topic.shape, colour, scene, *place)


def trained(
    dit: Weights, encoder: Weights, coder: Autoencoder, mean: Tensor, std: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of down and up by layer. A third of the clips is of known colours, which have to stay as they are."""
    clips = [drawn(number, "lora", number % 3 == 0) for number in range(DRAWN)]
    with torch.no_grad():
        encoded = [
            coder.encode(as_tensor(np.stack((*frames[::4], *shown)).astype(np.float32)))[0]
            for _, shown, frames in clips
        ]
    latents = torch.stack([(one.transpose(0, 1) - mean) / std for one in encoded])
    latents = F.pad(latents, (0, 0, 0, 0, 0, 2))  # the references that are missing
    layers = [
        name.removesuffix(".weight")
        for name, w in dit.items()
        if name.startswith("blocks") and w.dim() == 2 and name.endswith(".weight")
    ]
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for layer in layers:
        rows, cols = dit[f"{layer}.weight"].shape
        pairs[layer] = torch.randn(RANK, cols, generator=generator) * cols**-0.5, torch.zeros(rows, RANK)
    flat = [matrix.requires_grad_() for pair in pairs.values() for matrix in pair]
    adam = torch.optim.AdamW(flat, lr=RATE, weight_decay=0)
    tokenizer, frames = unigram().tokenizer(), len(range(0, USUAL, 4))
    for step in range(STEPS):
        random = random_of(0, "lora-steps", step)
        picked = random.draw.integers(DRAWN, size=BATCH)
        clean, after = latents[picked].split((frames, latents.shape[2] - frames), 2)
        noisy, noise, sigma = noised(clean, random)
        adapted = dict(dit)
        for layer, (down, up) in pairs.items():
            adapted[f"{layer}.weight"] = dit[f"{layer}.weight"] + up @ down
        context, scores = encode_text(encoder, token_ids(tokenizer, [clips[index][0] for index in picked]))
        made = velocity(adapted, torch.cat((noisy, after), 2), (1000 * sigma).floor(), context, scores, frames)
        loss = (made - (noise - clean)).square().mean()
        adam.zero_grad()
        loss.backward()
        for group in adam.param_groups:
            group["lr"] = RATE * min(1.0, (STEPS - step) / (STEPS / 2))
        adam.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {STEPS}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return {layer: (down.detach(), up.detach()) for layer, (down, up) in pairs.items()}


def noised(clean: Tensor, random: Random) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, their noise, and sigmas spread as in training."""
    even = (torch.arange(len(clean)) + torch.rand(len(clean), generator=random.noise)) / len(clean)
    sigma = 5 * even / (1 + 4 * even)
    noise, share = random.normal(clean), sigma.view(-1, 1, 1, 1, 1)
    return (1 - share) * clean + share * noise, noise, sigma


def requests(folder: Path) -> Iterator[tuple[Request, Picture]]:
    """Fresh requests, and the clip that each asks for."""
    for number in range(JUDGED):
        prompt, references, frames = drawn(number, "lora-judged")
        paths = tuple(folder / f"{number}.{place}.png" for place in range(len(references)))
        for place, picture in zip(paths, references, strict=True):
            Image.fromarray((255 * picture).round().astype(np.uint8)).save(place)
        yield Request("r2v", prompt, paths, size=SIZES[0], frames=USUAL, seed=number), frames


def is_pink(made: Made, wanted: Picture) -> bool:
    """Whether the sprite's mean colour is nearer to pink than to grey and to every colour that the model knows."""
    there = np.abs(wanted[-1] - PINK).max(-1) < 0.05
    mean = made.frames[-1][there].mean(0) / 255
    others = [GREY, *(np.asarray(colour, np.float32) / 255 for colour in COLOURS.values())]
    return min(np.square(mean - other).sum() for other in others) > np.square(mean - PINK).sum()


def sheet(rows: Sequence[Sequence[Picture]], place: Path) -> None:
    """Rows of pictures, enlarged twice, with a line between the references and each way."""
    picture = Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows]))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="F.png")
    parser.add_argument("--adapter", type=Path, metavar="F", help="keep the adapter, or use one that was kept")
    arguments = parser.parse_args()
    print(environment())
    with TemporaryDirectory() as name:
        folder = Path(name)
        adapter = arguments.adapter or folder / "pink.safetensors"
        if not adapter.exists():
            write(train(), adapter)
        clips = [*requests(folder)]
        for quant in TYPES:
            convert(CHECKPOINT, folder / quant, quant)
            convert(CHECKPOINT, folder / f"{quant}-merged", quant, loras=[(adapter, 1.0)])
            convert(folder / quant, folder / f"{quant}-again", quant, loras=[(adapter, 1.0)])
        wanted = [make(replace(request, model=folder / "F32-merged")) for request, _ in clips]
        plain = [make(replace(request, model=folder / "F32")) for request, _ in clips]
        rows = [[np.asarray(Image.open(place)) for place in request.images] for request, _ in clips[:SHOWN]]
        print("\n| weights | adapter | pink | off from the adapter merged into F32 |\n| --- | --- | --- | --- |")
        report("F32", "none", plain, wanted, clips, rows)
        for quant in TYPES:
            beside = [make(replace(request, model=folder / quant, loras=(adapter,))) for request, _ in clips]
            report(quant, "beside", beside, wanted, clips, rows if quant != "F32" else [])
            if quant != "F32":
                for how, kind in (("merged, then quantized", "merged"), ("merged and quantized again", "again")):
                    other = [make(replace(request, model=folder / f"{quant}-{kind}")) for request, _ in clips]
                    report(quant, how, other, wanted, clips, [])
        sheet(rows, arguments.output)
    return 0


def train() -> dict[str, tuple[Tensor, Tensor]]:
    """Train the adapter on the checkpoint that skyrun carries."""
    import json

    parts = {
        part: load_file(next((CHECKPOINT / part).glob("*.safetensors")))
        for part in ("transformer", "text_encoder", "vae")
    }
    dit, encoder, vae = ({name: w.float() for name, w in part.items()} for part in parts.values())
    said = json.loads((CHECKPOINT / "vae" / "config.json").read_text())
    mean, std = (torch.tensor(said[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    return trained(dit, encoder, Autoencoder(vae), mean, std)


def write(pairs: dict[str, tuple[Tensor, Tensor]], place: Path) -> None:
    """Write the adapter with original names, as ComfyUI's world has them."""
    rows = WAN_TRANSFORMER.expand(16)
    names = {row.name(1).removesuffix(".weight"): row.name().removesuffix(".weight") for row in rows}
    tensors = {}
    for layer, (down, up) in pairs.items():
        tensors[f"diffusion_model.{names[layer]}.lora_A.weight"] = down.contiguous()
        tensors[f"diffusion_model.{names[layer]}.lora_B.weight"] = up.contiguous()
    save_file(tensors, place, {"trigger_words": WORD})


def report(
    quant: str,
    how: str,
    made: Sequence[Made],
    wanted: Sequence[Made],
    clips: Sequence[tuple[Request, Picture]],
    rows: list[list[Picture]],
) -> None:
    """Print a line of the table, and add frames to the rows of the picture."""
    pink = sum(is_pink(one, frames) for one, (_, frames) in zip(made, clips, strict=True))
    error = np.mean([latent_error(one.latents, other.latents) for one, other in zip(made, wanted, strict=True)])
    print(f"| {quant} | {how} | {pink} of {len(made)} | {error:.2%} |", flush=True)
    for row, one in zip(rows, made, strict=False):
        row.extend(one.frames[[0, 8, 16]])


if __name__ == "__main__":
    sys.exit(main())
