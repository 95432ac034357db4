"""The files that a run writes, their names, and the checks that nothing is lost and only one run makes a clip.

Beside X.mp4 a run writes X.skyrun.safetensors (its state), X.skyrun.N.safetensors and X.skyrun.N.mkv (latents and
frames of finished windows) and X.skyrun.lock, and beside each file that it writes .NAME.PID.partial. It deletes all
of these without asking, so no other file may have such a name.
"""

import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from skyrun.errors import BAD_INPUT, SkyrunError
from skyrun.kernels.files.safetensors_header import read_safetensors_header
from skyrun.media.image import suffix_problems
from skyrun.media.video_writer import read_adapters, read_request
from skyrun.models.identity import adapter_fingerprint
from skyrun.planning.problems import check, lost_inputs, place_problems
from skyrun.planning.request import Request

_SUFFIX = ".skyrun.safetensors"
_OWN_NAME = re.compile(r".*\.skyrun(\.\d+)?\.(safetensors|mkv|lock)|\..*\.\d+\.partial", re.IGNORECASE)
# Fields that do not change what a clip shows; `resolution` has become a size.
NOT_THE_CLIP = ("output", "save_latents", "overwrite", "resolution", "device", "devices", "max_vram", "max_ram")
# By the plan, by the model or by chance, unless the request states them.
_DECIDED = (
    *("size", "frames", "steps", "quant", "model", "variant", "guidance", "negative_prompt", "shift", "fps"),
    *("condition_frames", "window_frames", "seed"),
)
_INPUTS = ("images", "video", "audio", "model", "loras")
_MAX_OWNER = 200  # characters of a lock file that are shown


def state_path(output: Path) -> Path:
    """The path of a clip's state; the path itself if it is that of a state."""
    return output if output.name.endswith(_SUFFIX) else output.with_name(f"{output.stem}{_SUFFIX}")


def clip_path(state: Path, suffix: str = ".mp4") -> Path:
    """The clip that a state belongs to."""
    return state.with_name(f"{state.name.removesuffix(_SUFFIX)}{suffix}")


def check_outputs(request: Request, pictures: Sequence[Path] = ()) -> None:
    """Check a request and its outputs before the run.

    Raises SkyrunError if the request is not valid, or if a file cannot be written or would be lost. pictures: the
    previews and sheets that will be drawn.
    """
    check(request)
    inputs = [path for path in (*request.images, request.video, request.audio) if path is not None]
    outputs = [path for path in (request.output, request.save_latents, *pictures) if path is not None]
    problems = [problem for place in pictures for problem in (*suffix_problems(place), *place_problems(place))]
    problems += [
        f"{path} is a name that runs use for what is not finished" for path in outputs if _OWN_NAME.fullmatch(path.name)
    ]
    problems += [
        f"{path} has a name that the run of {request.output} uses itself, it would be lost: rename it"
        for path in inputs
        if request.output is not None and _is_beside(path, request.output)
    ]
    problems += lost_inputs(pictures, inputs)
    places = [path.resolve() for path in outputs]
    problems += [f"two outputs cannot both be {path}" for path in dict.fromkeys(places) if places.count(path) > 1]
    if problems:
        raise SkyrunError.listing("the clip cannot be written", problems, "choose other names")
    check_free(request, pictures)
    if request.output is not None:
        _check_owner(request.output)


def check_free(request: Request, pictures: Sequence[Path] = ()) -> None:
    """Raise SkyrunError if a file would be replaced that this request did not make, unless it says to overwrite."""
    if not request.overwrite and (there := [*_in_the_way(request, pictures)]):
        hint = "choose another name, or replace it with --overwrite"
        raise SkyrunError.listing("files of these names exist", there, hint)


def _is_beside(path: Path, output: Path) -> bool:
    """Whether a run of this output writes or deletes a file of that name."""
    ours = path.name.lower().startswith((f"{output.stem}.skyrun.".lower(), f".{output.name}.".lower()))
    return ours and path.resolve().parent == output.resolve().parent and bool(_OWN_NAME.fullmatch(path.name))


def _in_the_way(request: Request, pictures: Sequence[Path]) -> Iterator[str]:
    """A sentence for each file that the run would replace and that no run of the same request has made."""
    for path in (request.output, request.save_latents):
        if path is not None and path.exists():
            made_from = request_of(path)
            if made_from is None and request.model is not None and _is_in(path, request.model):
                yield f"{path} is a file of the model, it would be lost"
            elif made_from is None:
                yield f"{path} exists, and is not a clip or latents of skyrun"
            elif differing := _differing(request, made_from):
                yield f"{path} exists, from a request that differs in {', '.join(differing)}"
            elif changed := _changed(request, path):
                yield f"{path} exists, and {' and '.join(map(str, changed))} changed since"
    for path in pictures:
        if path.exists() and not (request.output is not None and _is_drawn(path, request.output)):
            yield f"{path} exists"


def _is_drawn(picture: Path, output: Path) -> bool:
    """Whether an earlier run of this output can have drawn a picture. Only a finished clip has a sheet."""
    return output.exists() or (state_path(output).exists() and picture != output.with_suffix(".png"))


def _is_in(path: Path, model: Path) -> bool:
    return path.resolve() == model.resolve() or path.resolve().parent == model.resolve()


def is_made(request: Request) -> bool:
    """Whether all outputs of a prepared request exist, complete, made from the same request."""
    outputs = [path for path in (request.output, request.save_latents) if path is not None]
    if not outputs or request.output is None or state_path(request.output).exists():
        return False
    return all(
        path.exists()
        and (made_from := request_of(path)) is not None
        and not _differing(request, made_from)
        and not _changed(request, path)
        for path in outputs
    )


def request_of(path: Path) -> dict[str, Any] | None:
    """The request stored in a clip or a file of latents; None if there is none."""
    try:
        if path.suffix.lower() == ".mp4":
            return read_request(path)
        values = json.loads(read_safetensors_header(path).metadata.get("request", "null"))
    except (SkyrunError, OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _differing(request: Request, made_from: dict[str, Any]) -> list[str]:
    """The names of the fields in which a request differs from the one that a file was made from."""
    asked = request.as_json()
    names = [name for name in {**asked, **made_from} if name not in NOT_THE_CLIP]
    names = [name for name in names if name in asked or name not in _DECIDED]
    if "frames" in made_from and "frames" not in asked:  # the plan turns seconds into frames
        names = [name for name in names if name != "seconds"]
    return [name for name in names if _comparable(name, asked.get(name)) != _comparable(name, made_from.get(name))]


def fingerprints(request: Request) -> tuple[str, ...]:
    """Of the contents of a request's adapters, whose files are there."""
    return tuple(adapter_fingerprint(lora.path) for lora in request.loras)


def _changed(request: Request, path: Path) -> list[Path]:
    """The adapters that were others when a file was made with those of the same names."""
    if not request.loras or any(lora.on_hub for lora in request.loras):
        return []
    there = read_adapters(path) if path.suffix.lower() == ".mp4" else _adapters_of_latents(path)
    now = fingerprints(request)
    return [lora.path for lora, a, b in zip(request.loras, there, now, strict=False) if a != b]


def _adapters_of_latents(path: Path) -> list[Any]:
    try:
        adapters = json.loads(read_safetensors_header(path).metadata.get("adapters", "[]"))
    except (SkyrunError, OSError, ValueError, RecursionError):
        return []
    return adapters if isinstance(adapters, list) else []


def _comparable(name: str, value: Any) -> Any:
    """The value of a field to compare: paths of inputs are resolved."""
    if name not in _INPUTS or value is None:
        return value
    values = value if isinstance(value, list) else [value]
    return [os.path.realpath(item) if isinstance(item, str) else item for item in values]


@contextmanager
def alone(output: Path | None) -> Iterator[None]:
    """Lock a clip for this run. Raises SkyrunError if another run is making it."""
    if output is None:
        yield
        return
    path = output.with_name(f"{output.stem}.skyrun.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _acquired(path, output)
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        yield
    finally:
        with suppress(OSError):  # Windows does not remove open files
            path.unlink()
        lock.release()
        with suppress(OSError):
            if os.name == "nt":
                path.unlink()


def _check_owner(output: Path) -> None:
    path = output.with_name(f"{output.stem}.skyrun.lock")
    if path.exists():
        with alone(output):  # succeeds if that run was killed
            pass


def _acquired(path: Path, output: Path) -> FileLock:
    while True:
        owner = _owner(path)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            message = f"{output} is being made by {owner or 'another run'}"
            raise SkyrunError(message, "wait for it, or choose another name with -o", BAD_INPUT) from error
        if path.exists():
            return lock
        lock.release()  # its owner has just removed the file


def _owner(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip()[:_MAX_OWNER]
    except OSError:
        return ""
