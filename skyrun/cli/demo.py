"""The whole chain on a small model: build a checkpoint, convert it, draw a reference, make a clip."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from skyrun.cli.report import plan_text, result_text
from skyrun.engine.run import Result
from skyrun.kernels.atomic import replacing
from skyrun.planning.job import Job, prepare
from skyrun.planning.request import Request
from skyrun.quant.conversion import convert
from skyrun.tools.tiny_checkpoint import CheckpointDims, write_checkpoint
from skyrun.units import duration, size

_PROMPT = "A person walking by the sea, looking at the camera."
_SIZE = (208, 352)
_FRAMES = 17
_QUANT = "Q4_K"


def run_demo(folder: Path, say: Callable[[str], None], follow: Callable[[Job], Result]) -> dict[str, Any]:
    """Make everything inside `folder`. `follow` runs the job and shows it. Returns where things are."""
    start = time.perf_counter()
    checkpoint, model, picture, clip = (folder / name for name in ("checkpoint", "model", "reference.png", "clip.mp4"))
    say("1. building a small checkpoint: the architecture of SkyReels-V3 R2V, random weights")
    write_checkpoint(checkpoint, CheckpointDims())
    say(f"2. converting it to {_QUANT}")
    summary = convert(checkpoint, model, _QUANT)
    for file in summary["files"]:
        say(f"   {file['path']}: {size(file['bytes'])}")
    say("3. drawing a reference picture")
    with replacing(picture) as partial:
        draw_reference().save(partial, format="PNG")
    say("4. making a clip from it")
    request = Request("r2v", _PROMPT, (picture,), clip, model, size=_SIZE, frames=_FRAMES, seed=1)
    job = prepare(request)
    say(plan_text(job))
    result = follow(job)
    say(result_text(result))
    say(f"done in {duration(time.perf_counter() - start)}. Weights are random, so the clip shows moving colours:")
    say("what ran is the chain, from published checkpoint to mp4. Next: convert a real one with `skyrun convert`.")
    paths = {"checkpoint": checkpoint, "model": model, "reference": picture, "clip": clip}
    for name, path in paths.items():
        say(f"   {name}: {path}")
    return {name: str(path) for name, path in paths.items()}


def draw_reference() -> Image.Image:
    """A figure before a sunset, 480 x 360."""
    image = Image.new("RGB", (480, 360))
    canvas = ImageDraw.Draw(image)
    for row in range(360):
        warmth = row / 360
        canvas.line((0, row, 480, row), fill=(int(40 + 200 * warmth), int(60 + 90 * warmth), int(150 - 60 * warmth)))
    canvas.ellipse((300, 150, 400, 250), fill=(255, 214, 120))
    canvas.rectangle((0, 250, 480, 360), fill=(28, 60, 92))
    for wave in range(0, 480, 12):
        height = 250 + 4 * math.sin(wave / 20)
        canvas.line((wave, height, wave + 12, 250 + 4 * math.sin((wave + 12) / 20)), fill=(250, 190, 120), width=3)
    canvas.ellipse((150, 110, 210, 170), fill=(60, 36, 40))
    canvas.rounded_rectangle((135, 170, 225, 330), radius=30, fill=(120, 30, 50))
    return image
