"""`skyrun demo`: convert the built-in model, draw references as the prompt says, and make a clip."""

import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from skyrun.cli.commands.run import pictures_of, run_clip
from skyrun.cli.console import emit, say
from skyrun.demo.words import known_in, pictured, words_text
from skyrun.demo.world import Picture, scene_picture, sprite_picture, tint
from skyrun.engine.output import check_free, check_outputs
from skyrun.errors import SkyrunError
from skyrun.hub.built_in import QUANT, built_in_folder, is_converted
from skyrun.hub.store import parse_name
from skyrun.media.image import open_image, write_image
from skyrun.models.folder import open_folder
from skyrun.planning.own_clips import read_own_clips
from skyrun.planning.problems import place_problems, value_problems
from skyrun.planning.request import Request
from skyrun.tasks.skyreels_v3 import REFERENCE_TO_VIDEO
from skyrun.units import duration, printable

_MODEL = "demo"


def execute(arguments: Namespace) -> int:
    """Make the clip. Its contact sheet and the references that are drawn are put beside it."""
    start = time.perf_counter()
    if not known_in(arguments.prompt):
        raise SkyrunError(f"the small model knows no word of {arguments.prompt!r}", words_text())
    clip, images = arguments.output, tuple(arguments.image)
    drawn = () if images else _places(arguments.prompt, clip)
    request = Request(
        REFERENCE_TO_VIDEO.name,
        arguments.prompt,
        images or drawn,
        clip,
        size=arguments.size,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    problems = request.type_problems() or value_problems(request)
    if problems := problems or place_problems(clip):
        raise SkyrunError.listing("the clip cannot be made", problems, "see `skyrun demo --help`")
    name = parse_name(_MODEL)
    step = "reading what was converted before" if is_converted(name) else "converting the checkpoint"
    say(f"1. {step}: a small model of the same architecture that comes with skyrun, as {QUANT}")
    model = built_in_folder(name)
    request = _fitted(replace(request, model=model), bool(images))
    pictures = pictures_of(clip, arguments)
    check_free(request, [*pictures, *drawn])
    say("2. the references, what moves and where: " + " and ".join(str(place) for place in request.images))
    for place, picture in zip(drawn, _drawn(request) if drawn else (), strict=True):
        write_image(place, Image.fromarray((picture * 255).round().astype(np.uint8)))
    check_outputs(request, pictures)
    say("3. making the clip: the weights stream from the file, block by block")
    run_clip(request, arguments)
    say(f"done in {duration(time.perf_counter() - start)}. {clip} shows: {printable(arguments.prompt)}")
    say("The same steps run with a model of 14 billion weights. Next:")
    say('   skyrun demo -p "a blue ball bounces by the sea"     another clip; skyrun demo --help lists the words')
    say("   skyrun plan r2v                                     what this machine can make, and how long that takes")
    say('   skyrun run r2v -p "…" --image her.png               a real clip; the model is fetched first')
    if arguments.json:
        paths = {"clip": clip, "model": model, "sheet": clip.with_suffix(".png")}
        values = {name: str(path) for name, path in paths.items()}
        emit({"event": "result", **values, "references": [str(path) for path in request.images]})
    return 0


def _places(prompt: str, clip: Path) -> tuple[Path, ...]:
    """Where the references are drawn: the sprite, and the scene unless it is white."""
    count = 1 if pictured(prompt)[2] == "white" else 2
    return tuple(clip.with_suffix(f".reference-{number}.png") for number in range(1, count + 1))


def _drawn(request: Request) -> list[Picture]:
    """The references that the prompt names, in the size of the clip."""
    assert isinstance(request.size, tuple)
    colour, shape, scene = pictured(request.prompt)
    draw = np.random.default_rng(request.seed)
    pictures = [sprite_picture(shape, tint(colour, draw), request.size), scene_picture(scene, request.size, draw)]
    return pictures[: len(request.images)]


def _fitted(request: Request, has_own_pictures: bool) -> Request:
    """The request with a size and a length that the model makes."""
    (transformer,) = open_folder(request.model).transformers
    own = read_own_clips(transformer)
    if own is None:
        raise SkyrunError(f"{transformer.path} is not the model of the demo", f"skyrun remove {_MODEL}, then try again")
    width, height = open_image(request.images[0]).size if has_own_pictures else own.sizes[0][::-1]
    return own.fitted(request, height, width)
