"""The process that plans clips and looks into files for the server: python -m skyrun.web.helper

It holds torch and FFmpeg, which the server does not load. A line of JSON on stdin is a question, the line that it
prints is the answer. It ends when stdin does.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from skyrun.errors import FAILED, SkyrunError
from skyrun.hub.local import wanted_name, whole_folder
from skyrun.hub.store import sources_of
from skyrun.media.contact_sheet import contact_sheet, places
from skyrun.media.container import Track, opened
from skyrun.media.image import image_format, open_image, write_image
from skyrun.media.speech import read_speech
from skyrun.media.video_reader import frames_at, quarter_turns
from skyrun.media.video_writer import read_request
from skyrun.planning.hardware import this_machine
from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request
from skyrun.presets import Hardware, probe
from skyrun.presets.machine.hardware import REPORTED
from skyrun.streaming.device import choose_device
from skyrun.tasks.sizes import WIDE
from skyrun.tasks.windows import SPEECH_RATE
from skyrun.web.folder import Folder
from skyrun.web.values import request_of

_POSTER_FRAMES, _POSTER_COLUMNS, _POSTER_SIZE = 6, 3, (960, 960)


def main() -> int:
    """Answer questions until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin.buffer:
        question = json.loads(line)
        try:
            answer = {"answer": QUESTIONS[question.pop("ask")](**question)}
        except SkyrunError as error:
            answer = {"error": _told(error)}
        except OSError as error:
            answer = {"error": _told(SkyrunError(str(error), "check the path, its permissions and free space", FAILED))}
        except Exception as error:
            traceback.print_exc()
            told = f"this failed with an error that it should not have: {type(error).__name__}: {error}"
            answer = {"error": _told(SkyrunError(told, "the terminal of the server has the details", FAILED))}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _told(error: SkyrunError) -> dict[str, Any]:
    return {"message": error.message, "hint": error.hint, "code": error.code}


def plan(root: str, values: dict[str, Any], free: dict[str, int] | None) -> dict[str, Any]:
    """The plan of a job, made for what its inputs are, as `skyrun plan --json` has it, and what must be fetched.

    free: bytes of memory that are free when no clip is made; None: what is free now.
    """
    request = request_of(values, Folder(Path(root)))
    shape, speech = _input_shape(request)
    if speech is not None and request.seconds is None and request.frames is None:
        request = replace(request, seconds=min(speech, request.spec.seconds[1]))
    name = wanted_name(request.model.as_posix() if request.model else None, request.task, request.quant)
    folder = whole_folder(name) if name is not None else request.model
    if name is not None:
        request = replace(request, model=folder, quant=None if folder else name.quant or None)
        request = request if folder else replace(request, variant=name.variant)
    hardware = _machine(request.device, folder, free)
    limits = {"dtype": request.dtype, "max_vram": request.max_vram, "max_ram": request.max_ram}
    planned = plan_request(request, hardware, shape, **limits)
    clip = {"fps": request.spec.fps, "seconds": planned.workload.frames / request.spec.fps}
    missing = {"model": str(name), "from": sources_of(name)} if name is not None and folder is None else None
    return planned.as_json() | clip | {"fetch": missing}


@lru_cache(maxsize=8)
def _found_machine(device: str | None, model: Path | None) -> Hardware:
    return this_machine(device, model)


def _machine(device: str | None, model: Path | None, free: dict[str, int] | None) -> Hardware:
    """This machine. What takes a second to measure is measured once."""
    kind = choose_device(device).type if device is not None else None
    found = _found_machine(kind, model)
    now = probe(found.device, model or Path.cwd(), measure=False)
    return found.knowing(REPORTED, **(free or {"vram_free": now.vram_free, "ram_free": now.ram_free}))


def _input_shape(request: Request) -> tuple[tuple[int, int], float | None]:
    """Height and width of what the clip is shaped like, and seconds of speech."""
    shape, speech = WIDE, None
    for path in (request.video, *request.images[:1]):
        if path is not None and path.is_file():
            seen = _seen(path, path.stat().st_mtime_ns)
            shape = (seen["height"], seen["width"]) if seen.get("height") else shape
            break
    if request.audio is not None and request.audio.is_file():
        speech = _seen(request.audio, request.audio.stat().st_mtime_ns).get("seconds")
    return shape, speech


def look(path: str) -> dict[str, Any]:
    """What an uploaded file is: "image", "video" or "audio", its size, its length, its format, and how it was made."""
    return _seen(Path(path), Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _seen(path: Path, changed: int) -> dict[str, Any]:
    try:
        image, format = open_image(path), image_format(path)
        return {"kind": "image", "format": format, "height": image.height, "width": image.width}
    except SkyrunError as no_image:
        first = no_image
    try:
        return _seen_video(path)
    except SkyrunError as no_video:
        second = no_video
    try:
        with opened(path, "recording") as container:
            Track.audio(path, container)
            format = container.format.name.split(",")[0]
        length = len(read_speech(path, SPEECH_RATE, (0.0, 1e6), None).samples) / SPEECH_RATE
        return {"kind": "audio", "format": format, "seconds": round(length, 3)}
    except SkyrunError as third:
        told = first if "million" in first.message else second if "codec" in second.message else third
        if told is third:
            told = SkyrunError(
                "this is no image, video or recording that can be read", "use PNG, JPEG, WebP, MP4, WAV or MP3"
            )
        raise told from None


def _seen_video(path: Path) -> dict[str, Any]:
    with opened(path, "video") as container:
        track = Track.video(path, container)
        stream, format = track.stream, container.format.name.split(",")[0]
        frame = next(track.frames(), None)
        if frame is None:
            raise SkyrunError(f"{path} has no frame that can be read")
        rate = float(stream.average_rate or 0)
        seconds = float(container.duration or 0) / 1e6
        turned = quarter_turns(frame) % 2
        height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
        facts = {"height": height, "width": width, "fps": round(rate, 3), "seconds": round(seconds, 3)}
        facts["frames"] = int(stream.frames) or round(rate * seconds)
        sound = bool(container.streams.audio)
    said = None
    with suppress(SkyrunError):
        said = read_request(path)
    return {"kind": "video", "format": format, "sound": sound, **facts, "request": said}


def poster(path: str, to: str) -> dict[str, Any]:
    """Draw some frames of a clip, and say what the clip is."""
    seen = _seen_video(Path(path))
    sheet = contact_sheet(frames_at(Path(path), places(seen["frames"], _POSTER_FRAMES)), _POSTER_COLUMNS)
    sheet.thumbnail(_POSTER_SIZE)
    write_image(Path(to), sheet)
    return seen


QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {"plan": plan, "look": look, "poster": poster}

if __name__ == "__main__":
    raise SystemExit(main())
