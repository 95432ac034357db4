"""What the form asks for: the tasks with their inputs, the fields of a Request, and what they may be."""

import re
from typing import Any

from skyrun.hub.store import stored
from skyrun.kernels.files.recipes import RECIPES
from skyrun.planning.problems import DTYPES, PRECISIONS
from skyrun.planning.request import SHARED, Request
from skyrun.presets.attention import OFFERED
from skyrun.presets.plan import PREFERENCES
from skyrun.tasks import TASKS, TaskSpec
from skyrun.tasks.sources import BUILT_IN
from skyrun.version import __version__
from skyrun.web.folder import Folder
from skyrun.web.values import FIELDS, kind, with_defaults

# Fields that nobody sets in a form: places are ours, and how windows are cut only tests change.
_HIDDEN = ("output", "save_latents", "overwrite", "condition_frames", "latent_rate", "window_frames")
_CHOICES = {"prefer": PREFERENCES, "quant": RECIPES, "dtype": DTYPES, "precision": PRECISIONS, "attention": OFFERED}
_NAMED = re.compile(r"((?:[a-z_]+, )*[a-z_]+): ")  # fields in a docstring, before what is said of them
_FILES = (".safetensors", ".gguf")


def form(folder: Folder) -> dict[str, Any]:
    """Everything that the form is made from, as plain values."""
    models = [{"name": model.name, "task": model.task, "bytes": model.nbytes} for model in stored() if model.complete]
    models += [{"name": name, "task": task, "bytes": 0} for name, task in BUILT_IN.items()]
    hints = _hints(Request.__doc__ or "")
    return {
        "version": __version__,
        "folder": str(folder.root),
        "tasks": [_task(spec) for spec in TASKS.values()],
        "fields": [_field(name, hints) for name in FIELDS if name not in _HIDDEN],
        "models": models,
        "files": sorted(path.name for path in folder.root.iterdir() if path.suffix.lower() in _FILES),
        "preferences": list(PREFERENCES),
    }


def _task(spec: TaskSpec) -> dict[str, Any]:
    names = ("name", "does", "image_name", "video", "audio", "whole_seconds", "takes_frames", "fps", "steps")
    values = {name: getattr(spec, name) for name in names}
    lists = {"images": spec.images, "seconds": spec.seconds, "resolutions": spec.resolutions}
    usual = with_defaults({"task": spec.name})
    return {
        **values,
        **{name: list(value) for name, value in lists.items()},
        "options": sorted(spec.options),
        "transitions": list(spec.transitions),
        "defaults": {"seconds": spec.usual_seconds, "resolution": spec.resolution} | usual,
    }


def _field(name: str, hints: dict[str, str]) -> dict[str, Any]:
    """A field. tasks: those that have it, if not all do. shared: whether it means the same for all tasks."""
    having = [spec.name for spec in TASKS.values() if name in spec.options]
    said = {"kind": kind(name), "hint": hints.get(name, ""), "choices": [*_CHOICES.get(name, ())]}
    return {"name": name, **said, "tasks": having, "shared": name in SHARED}


def _hints(docstring: str) -> dict[str, str]:
    """What a docstring says of each field: "name, other: a sentence." """
    text = " ".join(docstring.replace("`", "").split())
    found: dict[str, str] = {}
    places = [match for match in _NAMED.finditer(text) if set(match[1].split(", ")) <= set(FIELDS)]
    for match, after in zip(places, [*places[1:], None], strict=True):
        said = text[match.end() : after.start() if after else len(text)].strip().partition(". ")[0].rstrip(".;")
        found |= {name: said[:1].upper() + said[1:] for name in match[1].split(", ")}
    return found
