"""Judges the trained weights on fresh clips, and writes report.json and sheets of pictures."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from skyrun.demo.world import Picture
from skyrun.kernels.files.atomic import replacing
from training.autoencoder import Autoencoder
from training.autoencoder_stages import as_tensor
from training.clips import FRAMES, HELD_OUT, SIZE, TRAINED, Clip, draw_clip
from training.denoising import sample
from training.latents import Latents
from training.nearest import nearest
from training.stage import Weights, random_of
from training.text import unigram

REPORT = "report.json"
_TIMES = range(0, FRAMES, 4)  # the frames that are a latent frame's last
_SHOWN = 8  # rows of a sheet
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
        clips = [draw_clip(topic, SIZE, FRAMES, random.draw) for topic in picked]
        found = list(zip(clips, _made(clips, dit, encoder, vae, latents, random.noise), strict=True))
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


@torch.no_grad()
def _made(
    clips: Sequence[Clip], dit: Weights, encoder: Weights, vae: Weights, latents: Latents, noise: torch.Generator
) -> Sequence[Picture]:
    """The clips that the model makes of the same prompts and references, frames [17, H, W, 3]."""
    coder = Autoencoder(vae)
    references = []
    for clip in clips:
        mean = coder.encode(as_tensor(np.stack(clip.references).astype(np.float32)))[0].transpose(0, 1)
        references.append(F.pad(latents.normalised(mean), (0, 0, 0, 0, 0, 4 - mean.shape[1])))
    after = torch.stack(references)
    start = torch.randn(len(clips), 16, len(_TIMES), *after.shape[3:], generator=noise)
    with torch.compiler.set_stance("force_eager"):  # what was compiled for training gives NaN without gradients
        made = sample(dit, encoder, [clip.prompt for clip in clips], after, start, unigram().tokenizer())
    raw = made * latents.std.view(-1, 1, 1, 1) + latents.mean.view(-1, 1, 1, 1)
    frames = coder.decode(raw.transpose(1, 2).flatten(0, 1), len(_TIMES)).clamp(-1, 1)
    return list((frames.permute(0, 2, 3, 1).unflatten(0, (-1, FRAMES)) / 2 + 0.5).numpy())


def _judged(pairs: Sequence[tuple[Clip, Picture]]) -> dict[str, Any]:
    """The share of clips whose nearest drawn clip has the right motion, shape, colour, and all three."""
    wrong, right = [], {"motion": 0, "shape": 0, "colour": 0, "all": 0}
    for clip, frames in pairs:
        scene = clip.references[1] if len(clip.references) > 1 else np.ones_like(clip.references[0])
        found = nearest(frames[list(_TIMES)], scene, clip.topic.scene, list(_TIMES), FRAMES)
        for name in ("motion", "shape", "colour"):
            right[name] += getattr(found, name) == getattr(clip.topic, name)
        right["all"] += found == clip.topic
        if found != clip.topic:
            wrong.append({"shown": asdict(clip.topic), "nearest": asdict(found)})
    return {name: round(number / len(pairs), 4) for name, number in right.items()} | {"of": len(pairs), "wrong": wrong}


def _write_sheet(path: Path, pairs: Sequence[tuple[Clip, Picture]]) -> None:
    """A row per clip: its references, and the made frames 0, 4, 8, 12 and 16, enlarged twice."""
    rows = []
    for clip, frames in pairs:
        print(f"{path.name}: {clip.prompt}", flush=True)
        missing = [np.full_like(clip.references[0], _MISSING)] * (2 - len(clip.references))
        rows.append(np.concatenate([*clip.references, *missing, *frames[list(_TIMES)]], 1))
    picture = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    with replacing(path) as partial:
        picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(partial, "png")
