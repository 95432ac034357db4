"""From what a client sends to a Request: values by the names and types of its fields, files by their names.

Fields are read off the dataclass, so a new one can be sent, is checked, and appears in the form.
"""

import random
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, get_args

from skyrun.errors import SkyrunError
from skyrun.kernels.files.recipes import RECIPES
from skyrun.planning.config import read_config
from skyrun.planning.lora import Lora
from skyrun.planning.problems import value_problems
from skyrun.planning.request import SHARED, Request, is_text
from skyrun.tasks import TASKS
from skyrun.web.folder import Folder, Refused

PATHS = ("file", "files", "texts")  # kinds of fields that name files
FIELDS: dict[str, "Field[Any]"] = {field.name: field for field in fields(Request)}
_PLACES = {"output": ".mp4", "save_latents": ".safetensors"}
_NEVER = ("overwrite",)  # what is there is never replaced over HTTP
_FLAGS = {"true": True, "on": True, "1": True, "yes": True, "false": False, "off": False, "0": False, "no": False}
_STRENGTH = re.compile(r"(.+?)(:-?\d*\.?\d+)?")  # a file, and after a colon how much of it
_HINT = "fields are those of a Request: docs/web.md"


def kind(name: str) -> str:
    """What a field holds: "flag", "whole", "number", "text", "texts", "file", "files" or "size"."""
    types = set(get_args(FIELDS[name].type) or (FIELDS[name].type,))
    if Path in types:
        return "files" if Ellipsis in types else "file"
    if types & {str, Lora}:
        return "texts" if Ellipsis in types else "size" if len(types - {type(None)}) > 1 else "text"
    return {bool: "flag", int: "whole"}.get((types - {type(None)}).pop(), "number")


def from_texts(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Values from texts, as queries and forms have them. What is empty is left out; a field may come several times."""
    values: dict[str, Any] = {}
    for name, text in pairs:
        if name not in FIELDS or not text.strip():
            values |= {} if name in FIELDS else {name: text}
        elif kind(name) in ("files", "texts"):
            values.setdefault(name, []).append(text)
        else:
            values[name] = _parsed(kind(name), text)
    return values


def _parsed(what: str, text: str) -> Any:
    """The value that a text states; the text itself where it states none, for the message."""
    if what == "flag":
        return _FLAGS.get(text.strip().lower(), text)
    try:
        return int(text) if what == "whole" else float(text) if what == "number" else text
    except ValueError:
        return text


def checked(sent: Any, folder: Folder) -> dict[str, Any]:
    """The values of a job: those that were sent, with the user's defaults and a seed.

    Raises Refused that names each field with what is wrong with it, as the command line says it.
    """
    values = with_defaults(known(sent))
    if values.get("seed") is None:
        values["seed"] = random.SystemRandom().randrange(1 << 32)
    _refuse(problems(values, folder))
    return values


def again(before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The values of a job with changes, and with a new seed. Of another task, those that mean the same there."""
    stay = tuple(FIELDS) if changes.get("task", before["task"]) == before["task"] else SHARED
    return {name: value for name, value in before.items() if name in stay and name != "seed"} | changes


def known(values: Any) -> dict[str, Any]:
    """The values that say something. Raises Refused for fields that there are not."""
    if not isinstance(values, dict):
        raise Refused(400, f"got {type(values).__name__} in place of an object of fields", _HINT)
    if unknown := [str(name) for name in values if name not in FIELDS or name in _NEVER]:
        raise Refused(
            400, f"unknown field {', '.join(map(repr, unknown))}", _HINT, **dict.fromkeys(unknown, ["unknown"])
        )
    return {name: value for name, value in values.items() if value is not None and value != [] and value != ""}


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the user's defaults where nothing is said, as the command line has them."""
    config = read_config()
    said: dict[str, Any] = {"prefer": config.prefer, "quant": config.quant if "model" not in values else None}
    spec = TASKS.get(str(values.get("task")))
    if spec is not None and "size" not in values and config.resolution in spec.resolutions:
        said["resolution"] = config.resolution
    return {name: value for name, value in said.items() if value is not None} | values


def _refuse(found: dict[str, list[str]]) -> None:
    if found:
        sentences = [problem for problems in found.values() for problem in problems]
        whole = SkyrunError.listing("this cannot be run", sentences)
        raise Refused(400, whole.message, "mend what is named, and send it again", **found)


def _has_half_a_character(value: Any) -> bool:
    """Whether there is half of a surrogate pair in a text or in one of several, which no client could be sent."""
    texts = value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and not is_text(text) for text in texts)


def problems(values: dict[str, Any], folder: Folder) -> dict[str, list[str]]:
    """What is wrong with the values, by the field that it is wrong with; "" for what no single field mends."""
    values, found = dict(values), dict[str, list[str]]()
    for name in [name for name, value in values.items() if _has_half_a_character(value)]:
        found[name] = [f"{name} is {reprlib.repr(values[name])}, which is not text in UTF-8"]
        values[name] = _good(name, values)
    for name in [name for name in values if kind(name) in PATHS]:
        try:
            values[name] = _paths(name, values[name], folder)
        except Refused as refusal:
            found[name] = [refusal.message]
            values[name] = _good(name, values)
    for name in ("task", "prompt"):
        values.setdefault(name, "")
    request = Request(**{name: _tuple(value) for name, value in values.items()})
    left = _sentences(request)
    for name in sorted(FIELDS, key=lambda name: name == "task"):  # another task mends much: it is tried last
        if left and getattr(request, name) != (good := _good(name, values)):
            mended = set(_sentences(replace(request, **{name: good})))
            found.setdefault(name, []).extend(text for text in left if text not in mended)
            left = [text for text in left if text in mended]
    return {name: texts for name, texts in ({**found, "": left}).items() if texts}


def _sentences(request: Request) -> list[str]:
    unknown = request.quant is not None and request.quant not in RECIPES
    types = [f"unknown type {request.quant!r}, expected {', '.join(RECIPES)}"] if unknown else []
    return request.type_problems() or [*value_problems(request), *types]


def _good(name: str, values: Mapping[str, Any]) -> Any:
    """A value of a field that nothing is wrong with, by the task of these values."""
    spec = TASKS.get(str(values.get("task")))
    if name == "task":
        return next(iter(TASKS))
    if name == "prompt":
        return "x"
    if name == "images" and spec is not None:
        return (Path("x"),) * spec.images[0]
    if name in ("video", "audio") and spec is not None:
        return Path("x") if getattr(spec, name) else None
    return FIELDS[name].default


def request_of(values: dict[str, Any], folder: Folder) -> Request:
    """The Request of a job, with paths. The model keeps its name, if it has one.

    Raises Refused if a file is gone, or if a field is unknown: jobs of other versions may have others.
    """
    known(values)
    paths = {name: _paths(name, value, folder) for name, value in values.items() if kind(name) in PATHS}
    return Request(**{name: _tuple(value) for name, value in ({"prompt": ""} | values | paths).items()})


def _paths(name: str, value: Any, folder: Folder) -> Any:
    """The paths of names that a client sent, none outside of the folders that are ours."""
    if name == "model":
        return _model(value, folder)
    if name in _PLACES:
        return folder.place(value, _PLACES[name]) if isinstance(value, str) else value
    if kind(name) == "file":
        return _found(value, folder) if isinstance(value, str) else value
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, (list, tuple)) or not all(isinstance(item, str) for item in several):
        return value  # the Request says what is wrong with it
    if kind(name) == "files":
        return tuple(_found(item, folder) for item in several)
    return tuple(_adapter(item, folder) for item in several)


def _found(name: str, folder: Folder) -> Path:
    path = folder.find(name)
    if path is None:
        raise Refused(400, f"there is no {name!r} in {folder.root}", "upload it, or put it into that folder")
    return path


def _adapter(text: str, folder: Folder) -> str:
    """A file with its strength, where it is one of ours; another text may be a name."""
    match = _STRENGTH.fullmatch(text)
    path = folder.find(match[1]) if match else None
    if match is None or path is None:
        raise Refused(
            400, f"there is no {text!r} in {folder.root}", "put it into that folder, or into that of the models"
        )
    return f"{path}{match[2] or ''}"


def _model(value: Any, folder: Folder) -> Any:
    """The path of a model in our folders; a name stays one, and is looked up when the clip is made."""
    if not isinstance(value, str):
        return value
    if (path := folder.find(value)) is not None and path.is_relative_to(folder.inputs) is False:
        return path
    from skyrun.hub.store import parse_name

    try:
        parse_name(value)
    except SkyrunError as error:
        raise Refused(400, error.message, error.hint) from None
    return Path(value)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def names_in(said: Mapping[str, Any], folder: Folder) -> dict[str, Any]:
    """The values of a request that a clip states, with names in place of paths: what it was made from may be gone."""
    return dict(_names_in(said, folder))


def _names_in(said: Mapping[str, Any], folder: Folder) -> Iterator[tuple[str, Any]]:
    for name, value in said.items():
        if name not in FIELDS or name in (*_PLACES, *_NEVER):
            continue
        if kind(name) == "file":
            value = folder.name_of(str(value))
        elif kind(name) == "files" and isinstance(value, list):
            value = [found for item in value if (found := folder.name_of(str(item)))]
        if value not in ("", []):
            yield name, value
