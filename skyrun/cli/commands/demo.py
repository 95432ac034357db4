"""`skyrun demo`: build a small checkpoint, convert it, draw a reference image, and make a clip."""

import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from skyrun.cli.commands.run import announce, make
from skyrun.cli.console import emit, say
from skyrun.engine.output import check_free, is_made
from skyrun.engine.resume import continue_or_start
from skyrun.errors import FAILED, SkyrunError
from skyrun.kernels.atomic import replacing
from skyrun.planning.problems import place_problems
from skyrun.planning.request import Request
from skyrun.quant.conversion import convert
from skyrun.tasks.skyreels_v3 import REFERENCE_TO_VIDEO
from skyrun.tools.tiny_checkpoint import CheckpointDims, write_checkpoint
from skyrun.units import duration, size

_PROMPT = "A person walking by the sea, looking at the camera."
_SIZE = (208, 352)
_FRAMES = 17
_QUANT = "Q4_K"


def execute(arguments: Namespace) -> int:
    """Make the clip. What it is made from is in a folder beside it with the same name."""
    clip: Path = arguments.output
    folder = clip.with_suffix("")
    try:
        summary = _run(arguments, clip, folder)
    except OSError as error:
        raise SkyrunError(f"cannot write {folder}: {error}", "check the path, permissions and space", FAILED) from error
    if arguments.json:
        emit({"event": "result"} | summary)
    return 0


def _run(arguments: Namespace, clip: Path, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    checkpoint, model, picture = (folder / name for name in ("checkpoint", "model", "reference.png"))
    images = tuple(arguments.image) or (picture,)
    request = Request(
        REFERENCE_TO_VIDEO.name,
        arguments.prompt or _PROMPT,
        images,
        clip,
        model,
        size=arguments.size or _SIZE,
        frames=_FRAMES,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    if problems := place_problems(clip):
        raise SkyrunError.listing("the clip cannot be written", problems, "choose another -o")
    check_free(request)
    say("1. building a small checkpoint: the architecture of SkyReels-V3 R2V, random weights")
    write_checkpoint(checkpoint, CheckpointDims())
    say(f"2. converting it to {_QUANT}")
    for file in convert(checkpoint, model, _QUANT)["files"]:
        say(f"   {file['path']}: {size(file['bytes'])}")
    if not arguments.image:
        say("3. drawing a reference image")
        with replacing(picture) as partial:
            draw_reference().save(partial, format="PNG")
    say("4. making a clip from it")
    job, state = continue_or_start(request)
    announce(job, state, arguments.json)
    if is_made(job.request) and not request.overwrite:
        say(f"{clip}: it is there already (--overwrite makes it again)")
    else:
        make(job, state, arguments)
    say(f"done in {duration(time.perf_counter() - start)}. Weights are random, so the clip shows moving colors:")
    say("everything ran, from published checkpoint to mp4. Next: make a real clip with `skyrun run`.")
    paths = {"checkpoint": checkpoint, "model": model, "reference": images[0], "clip": clip}
    for name, path in paths.items():
        say(f"   {name}: {path}")
    return {name: str(path) for name, path in paths.items()}


def draw_reference() -> Image.Image:
    """Draw a figure in front of a sunset, 480 x 360."""
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
