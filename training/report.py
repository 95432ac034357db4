"""Judges the trained weights on fresh clips, and writes report.json and sheets of pictures."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from skyrun.demo.world import Picture
from skyrun.kernels.files.atomic import replacing
from skyrun.tasks.skyreels_v3 import MAX_REFERENCES
from skyrun.tasks.windows import FRAMES_PER_LATENT
from training.autoencoder import Autoencoder
from training.autoencoder_stages import as_tensor
from training.clips import HELD_OUT, LEAST, MOST, SIZES, TRAINED, USUAL, Clip, draw_clip
from training.denoising import sample
from training.latents import Latents
from training.nearest import nearest
from training.stage import Weights, random_of
from training.text import unigram

REPORT = "report.json"
_FORMS = tuple(product((USUAL, LEAST, MOST), SIZES))  # clips have these lengths and sizes in turn
_SHOWN, _COLUMNS = 9, 5  # rows of a sheet, and frames of a clip in it
_MISSING = 0.5  # grey in place of a second reference


def write_report(
    folder: Path,
    dit: Weights,
    encoder: Weights,
    vae: Weights,
    latents: Latents,
    count: int,
    stages: list[dict[str, Any]],
) -> None:
    """Make `count` clips of trained and of held-out topics each, and write what is right in them."""
    judged = {}
    for name, topics in (("trained", TRAINED), ("held_out", tuple(sorted(HELD_OUT, key=str)))):
        random = random_of(1, name, 0)
        picked = [topics[random.draw.integers(len(topics))] for _ in range(count)]
        clips = [
            draw_clip(topic, size, frames, random.draw)
            for topic, (frames, size) in zip(picked, cycle(_FORMS), strict=False)
        ]
        found = _found(clips, dit, encoder, vae, latents, random.noise)
        judged[name] = _judged(found)
        _write_sheet(folder / f"{name}.png", found[:_SHOWN])
        print(f"{name}: {judged[name]}", flush=True)
    report = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "files": digests(folder / "checkpoint"),
        "stages": stages,
        "judged": judged,
    }
    with replacing(folder / "checkpoint" / REPORT) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint by its name there, but for the report that is put beside them."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != REPORT]
    return {path.relative_to(checkpoint).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _found(
    clips: Sequence[Clip], dit: Weights, encoder: Weights, vae: Weights, latents: Latents, noise: torch.Generator
) -> list[tuple[Clip, Picture]]:
    """Each clip with what the model makes of its prompt and references. Those of one form are made together."""
    made: dict[int, Picture] = {}
    for first in range(min(len(_FORMS), len(clips))):
        numbers = range(first, len(clips), len(_FORMS))
        some = _made([clips[number] for number in numbers], dit, encoder, vae, latents, noise)
        made |= dict(zip(numbers, some, strict=True))
    return [(clip, made[number]) for number, clip in enumerate(clips)]


@torch.no_grad()
def _made(
    clips: Sequence[Clip], dit: Weights, encoder: Weights, vae: Weights, latents: Latents, noise: torch.Generator
) -> Sequence[Picture]:
    """What the model makes of clips of one size and length, frames [T, H, W, 3]."""
    coder = Autoencoder(vae)
    references = []
    for clip in clips:
        mean = coder.encode(as_tensor(np.stack(clip.references).astype(np.float32)))[0].transpose(0, 1)
        references.append(F.pad(latents.normalised(mean), (0, 0, 0, 0, 0, MAX_REFERENCES - mean.shape[1])))
    after, length = torch.stack(references), len(_times(clips[0].frames))
    start = torch.randn(len(clips), 16, length, *after.shape[3:], generator=noise)
    with torch.compiler.set_stance("force_eager"):  # what was compiled for training gives NaN without gradients
        made = sample(dit, encoder, [clip.prompt for clip in clips], after, start, unigram().tokenizer())
    raw = made * latents.std.view(-1, 1, 1, 1) + latents.mean.view(-1, 1, 1, 1)
    frames = coder.decode(raw.transpose(1, 2).flatten(0, 1), length).clamp(-1, 1)
    return list((frames.permute(0, 2, 3, 1).unflatten(0, (len(clips), -1)) / 2 + 0.5).numpy())


def _times(frames: Picture) -> range:
    """The frames that are a latent frame's last."""
    return range(0, len(frames), FRAMES_PER_LATENT)


def _judged(pairs: Sequence[tuple[Clip, Picture]]) -> dict[str, Any]:
    """The share of clips whose nearest drawn clip has the right motion, shape, colour, and all three.

    That of all three is also told by size and by length.
    """
    wrong, each = [], defaultdict(list)
    for clip, frames in pairs:
        scene = clip.references[1] if len(clip.references) > 1 else np.ones_like(clip.references[0])
        times = _times(frames)
        found = nearest(frames[list(times)], scene, clip.topic.scene, times, len(frames))
        for name in ("motion", "shape", "colour"):
            each[name].append(getattr(found, name) == getattr(clip.topic, name))
        for name in ("all", "{}x{}".format(*frames.shape[1:]), f"{len(frames)} frames"):
            each[name].append(found == clip.topic)
        if found != clip.topic:
            wrong.append({"shown": asdict(clip.topic), "nearest": asdict(found), "frames": frames.shape[:3]})
    return {name: round(sum(right) / len(right), 4) for name, right in each.items()} | {
        "of": len(pairs),
        "wrong": wrong,
    }


def _write_sheet(path: Path, pairs: Sequence[tuple[Clip, Picture]]) -> None:
    """A row per clip: its references, and up to five of the made frames from the first to the last, enlarged twice."""
    rows = []
    for clip, frames in pairs:
        print(f"{path.name}: {clip.prompt}", flush=True)
        missing = [np.full_like(clip.references[0], _MISSING)] * (2 - len(clip.references))
        times = list(_times(frames))
        rows.append(np.concatenate([*clip.references, *missing, *frames[times[:: -(-len(times) // _COLUMNS)]]], 1))
    widest = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0)), constant_values=1) for row in rows]
    picture = Image.fromarray((np.concatenate(padded) * 255).round().astype(np.uint8))
    with replacing(path) as partial:
        picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(partial, "png")
