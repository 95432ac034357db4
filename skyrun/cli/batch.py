"""The requests of one command: one for each prompt and seed, each with its own output."""

import sys
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

from skyrun.cli.console import say
from skyrun.engine.output import request_of, state_path
from skyrun.errors import MODEL_MISSING, SkyrunError
from skyrun.media.video_writer import read_request
from skyrun.models.folder import open_folder
from skyrun.planning.model import choose_model
from skyrun.planning.problems import parse_request
from skyrun.planning.request import Request
from skyrun.tasks import TASKS

_MAX_PROMPTS = 10_000_000  # characters of all prompts


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read one prompt per line of a text file, and skip empty lines."""
    hint = "give a text file in UTF-8 with one prompt per line"
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = _bounded(file).splitlines()
    except FileNotFoundError as error:
        raise SkyrunError(f"{path} does not exist", hint, MODEL_MISSING) from error
    except (OSError, ValueError) as error:
        raise SkyrunError(f"{path} is not a list of prompts: {error}", hint) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise SkyrunError(f"{path} has no prompt in it", hint)
    return prompts


def _bounded(file: TextIO) -> str:
    """Read a whole file. Raises ValueError if it is longer than any list of prompts."""
    text = file.read(_MAX_PROMPTS + 1)
    if len(text) > _MAX_PROMPTS:
        raise ValueError(f"it is longer than {_MAX_PROMPTS} characters")
    return text


def _prompt_of_stdin() -> str:
    """Read a prompt from stdin."""
    try:
        text = _bounded(sys.stdin).removeprefix("\ufeff").strip()
    except (OSError, ValueError) as error:  # closed, or not text
        raise SkyrunError(f"stdin cannot be read: {error}", "write a prompt in UTF-8, or say it with -p") from error
    if not text:
        raise SkyrunError("stdin has no prompt in it", "write one, or say it with -p")
    return text


# Fields that state the same thing. One that is given replaces the other one of the earlier clip.
_INSTEAD = {"resolution": ("size",), "size": ("resolution",), "seconds": ("frames",), "frames": ("seconds",)}
# Fields of an earlier clip that are not taken over: they belong to the machine or to that command.
_MACHINE = ("device", "devices", "max_vram", "max_ram", "save_latents", "overwrite")


def requests_of(arguments: Namespace) -> list[Request]:
    """The requests that the arguments of `skyrun run` ask for: one for each prompt and seed.

    Arguments that are not given are None. With --from, the request of an earlier clip fills them in. Raises SkyrunError
    if a task or prompt is missing, or if the earlier clip has no valid request.
    """
    values = _made_before(arguments.source, arguments.task, arguments.model) if arguments.source else {}
    given = {field.name: getattr(arguments, field.name, None) for field in fields(Request)}
    given |= {
        "images": tuple(arguments.image),
        "loras": tuple(arguments.lora),
        "model": _path_of(arguments.model),
        "seed": None,
        "join": arguments.join or None,
    }
    given["overwrite"] = arguments.overwrite or None
    for name, value in given.items():
        if value not in (None, ()):
            values[name] = value
            for other in _INSTEAD.get(name, ()):
                values.pop(other, None)
    if "task" not in values:
        raise SkyrunError("say which task to run", "skyrun run TASK, see skyrun run --help; or --from CLIP.mp4")
    if not arguments.prompts and "prompt" not in values:
        raise SkyrunError("no prompt was given", "say with -p what the clip shows, or give a file with --prompts")
    prompts = list(read_prompts(arguments.prompts)) if arguments.prompts else [values["prompt"]]
    if arguments.prompt == "-":
        prompts = [_prompt_of_stdin()]
    seeds = list(dict.fromkeys(arguments.seed or [values.get("seed")]))
    values = {name: value for name, value in values.items() if name not in ("prompt", "seed")}
    digits = len(str(len(prompts)))
    requests = []
    for number, prompt in enumerate(prompts, 1):
        for seed in seeds:
            ending = f"-{number:0{digits}d}" * (len(prompts) > 1) + f"-{seed}" * (len(seeds) > 1)
            requests.append(_named(Request(**values, prompt=prompt, seed=seed), ending))
    return requests if len(requests) == 1 else [_with_seed(request) for request in requests]


def _path_of(model: str | None) -> Path | None:
    """The model if it is a file or folder; None if it is a name, which is looked up later."""
    return Path(model) if model is not None and Path(model).exists() else None


def _made_before(clip: Path, task: str | None, model: str | None) -> dict[str, Any]:
    """The request of an earlier clip, without the fields that belong to the machine it was made on.

    For another task, what means the same there, and the model if it does that task too. Another model has its own
    values where the clip was made with the usual ones of its model.
    """
    said = read_request(clip)
    if said is None:
        raise SkyrunError(f"{clip} does not say how it was made", "--from takes a clip that skyrun has made")
    request = parse_request(said)  # also checks it
    values = {field.name: getattr(request, field.name) for field in fields(Request)}
    values = {name: value for name, value in values.items() if name in said and name not in (*_MACHINE, "output")}
    if request.model is not None and not request.model.exists():
        del values["model"]  # the model was moved or deleted: use the default
    if task not in (None, request.task):
        shared = {name: value for name, value in request.for_task(task).items() if name in values}
        shared |= {"model": request.model} if "model" in values and _does(values["model"], task) else {}
        names = ", ".join(name for name in shared if name != "task")
        say(f"{clip} was made by {request.task}; taken over for {task}: {names}")
        return shared
    if model is not None or "model" not in values:
        usual = request.usual() | {"variant": request.variant}
        values = {name: value for name, value in values.items() if name not in usual or value != usual[name]}
    return values


def _does(model: Path, task: str) -> bool:
    """Whether a model that is there has a transformer for a task."""
    try:
        choose_model(open_folder(model), TASKS[task])
    except SkyrunError:
        return False
    return True


def _named(request: Request, ending: str) -> Request:
    """Give the files of a request unique names, with the number of the prompt, the seed, or both."""
    if not ending:
        return request
    base, latents = request.output or Path(f"{request.task}.mp4"), request.save_latents
    return replace(
        request,
        output=base.with_name(f"{base.stem}{ending}{base.suffix}"),
        save_latents=latents and latents.with_name(f"{latents.stem}{ending}{latents.suffix}"),
    )


def _with_seed(request: Request) -> Request:
    """Reuse the seed of an existing clip, so that a repeated command only makes the clips that are missing."""
    if request.seed is None and request.output is not None and request.output.exists():
        seed = (request_of(request.output) or {}).get("seed")
        return replace(request, seed=seed) if isinstance(seed, int) else request
    return request


def free_name(stem: str, suffix: str) -> Path:
    """A name in the current folder that no clip has, finished or not."""
    path, number = Path(stem + suffix), 1
    while path.exists() or state_path(path).exists():
        path, number = Path(f"{stem}-{number}{suffix}"), number + 1
    return path
