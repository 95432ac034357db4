"""The clips that one command makes: a request for every prompt and seed, each with a place of its own."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.media.video_writer import read_request
from skyrun.pipelines.state import state_path
from skyrun.planning.problems import parse_request
from skyrun.planning.request import Request


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line of a text file; empty lines do not count."""
    hint = "give a text file in UTF-8 with one prompt per line"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise SkyrunError(f"{path} does not exist", hint, MODEL_MISSING) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SkyrunError(f"{path} is no list of prompts: {error}", hint) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise SkyrunError(f"{path} has no prompt in it", hint)
    return prompts


def prompt_or_stdin(prompt: str) -> str:
    """The prompt, or for "-" all of stdin."""
    if prompt != "-":
        return prompt
    text = sys.stdin.read().strip()
    if not text:
        raise SkyrunError("stdin has no prompt in it", "write one, or say it with -p")
    return text


# What says the same in another way: one that is given takes the place of those that a clip was made with.
_INSTEAD = {"resolution": ("size",), "size": ("resolution",), "seconds": ("frames",), "frames": ("seconds",)}
_MACHINE = ("device", "max_vram", "max_ram", "save_latents")  # not of the clip


def requests_of(arguments: Namespace) -> list[Request]:
    """One request, or one for each of several prompts and seeds.

    Arguments of `skyrun run`; those that are not given are None. With --from they are those of a clip that was made
    before. SkyrunError if there is nothing to make, or something that is no request.
    """
    values = _made_before(arguments.source) if arguments.source else {}
    given = {field.name: getattr(arguments, field.name, None) for field in fields(Request)}
    given |= {"images": tuple(arguments.image), "model": None, "seed": None, "join": arguments.join or None}
    for name, value in given.items():
        if value not in (None, ()):
            values[name] = value
            for other in _INSTEAD.get(name, ()):
                values.pop(other, None)
    if "task" not in values:
        raise SkyrunError("nothing was said to make", "say what: skyrun run r2v ..., or --from CLIP.mp4")
    if not arguments.prompts and "prompt" not in values:
        raise SkyrunError("no prompt was given", "say with -p what the clip shows, or give a file with --prompts")
    prompts = list(read_prompts(arguments.prompts)) if arguments.prompts else [values["prompt"]]
    seeds = arguments.seed or [values.get("seed")]
    values = {name: value for name, value in values.items() if name not in ("prompt", "seed")}
    requests = [Request(**values, prompt=prompt_or_stdin(p), seed=seed) for p in prompts for seed in seeds]
    return requests if len(requests) == 1 else list(_apart(requests, len(prompts) > 1, len(seeds) > 1))


def _made_before(clip: Path) -> dict[str, Any]:
    """The settings of a clip, without what belongs to the machine that it was made on."""
    said = read_request(clip)
    if said is None:
        raise SkyrunError(f"{clip} does not say how it was made", "--from takes a clip that skyrun has made")
    request = parse_request(said)  # checks it as a whole
    values = {field.name: getattr(request, field.name) for field in fields(Request)}
    if request.model is not None and not request.model.exists():
        del values["model"]  # wherever it is now: as if none was named
    return {name: value for name, value in values.items() if name in said and name not in (*_MACHINE, "output")}


def _apart(requests: list[Request], prompts: bool, seeds: bool) -> Iterator[Request]:
    """Places that tell the clips apart: by the number of the prompt, by the seed, or by both."""
    count = len({request.prompt for request in requests})
    for index, request in enumerate(requests):
        number = index // (len(requests) // count) + 1
        ending = (f"-{number:0{len(str(count))}d}" if prompts else "") + (f"-{request.seed}" if seeds else "")
        base = request.output or Path(f"{request.task}.mp4")
        latents = request.save_latents
        yield replace(
            request,
            output=base.with_name(f"{base.stem}{ending}{base.suffix}"),
            save_latents=latents and latents.with_name(f"{latents.stem}{ending}{latents.suffix}"),
        )


def is_made(request: Request) -> bool:
    """Whether the clip of one of several requests is there, whole and made as it asks for."""
    if request.output is None or not request.output.exists() or state_path(request.output).exists():
        return False
    try:
        said = read_request(request.output) or {}
    except SkyrunError:
        return False
    asked = request.as_json()
    differing = {name for name in asked if said.get(name) != asked[name]}
    return not differing - {"output", "resolution", "seconds", "frames", *_MACHINE, *_paths(asked, said)}


def _paths(asked: dict[str, Any], said: dict[str, Any]) -> set[str]:
    """Inputs that are the same files, said differently."""
    same = set()
    for name in ("images", "video", "audio"):
        ours, theirs = ([Path(p).resolve() for p in _listed(values.get(name))] for values in (asked, said))
        if ours == theirs:
            same.add(name)
    return same


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def free_name(stem: str, suffix: str) -> Path:
    """A name in the current folder that no clip has, finished or not."""
    path, number = Path(stem + suffix), 1
    while path.exists() or state_path(path).exists():
        path, number = Path(f"{stem}-{number}{suffix}"), number + 1
    return path
