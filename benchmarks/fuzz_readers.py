"""What reads files from outside, as the commands do. SkyrunError is all that may come out."""

import json
from contextlib import suppress
from pathlib import Path

import torch

import skyrun.kernels.machine.choice as choice
from skyrun.cli.batch import requests_of
from skyrun.cli.parser import parser
from skyrun.engine.output import request_of
from skyrun.errors import SkyrunError
from skyrun.hub.manifest import Manifest
from skyrun.hub.store import stored
from skyrun.media.joined import read_audio, read_frames
from skyrun.media.speech import read_speech
from skyrun.media.video_reader import read_footage
from skyrun.models.folder import open_folder
from skyrun.models.identity import model_identity
from skyrun.planning.model import choose_model
from skyrun.planning.problems import check, parse_request
from skyrun.quant.plan import Settings
from skyrun.quant.planner import plan_conversion
from skyrun.tasks import TASKS
from skyrun.tasks.windows import SPEECH_RATE
from skyrun.tools.inspect import describe

PROMPT = "A cat, 猫, on the Sea"


def run_model(path: Path) -> None:
    """As a run opens it: the whole folder, the prompt's tokens; and as `skyrun info` describes it."""
    with suppress(SkyrunError):
        describe(path)
    folder = open_folder(path.parent)
    model = choose_model(folder, TASKS["a2v" if folder.has("image encoder") else "r2v"])
    model.encoder.token_ids(PROMPT)
    model_identity(model.files)


def convert(path: Path) -> None:
    """As `skyrun convert --dry-run`: the checkpoint that the file belongs to."""
    inside = path.parent.parent if path.parent.name in ("transformer", "text_encoder") else path.parent
    plan_conversion(inside, inside.parent / "out", Settings("Q8_0"))


def request(path: Path) -> None:
    """As `skyrun resume` and Request.from_json: parse it, check it, say it again."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return  # its readers are other kinds
    request = parse_request(values)
    parse_request(json.loads(json.dumps(request.as_json())))
    request.windows(100)
    check(request.absolute())


def tag(path: Path) -> None:
    """As `skyrun run --from` and `skyrun info`, and as a clip that is in the way."""
    request_of(path)
    with suppress(SkyrunError):
        describe(path)
    (request,) = requests_of(parser().parse_args(["run", "--from", str(path)]))
    check(request)


def video(path: Path) -> None:
    """Its last frames, then all of it, as a clip that is joined to it."""
    footage = read_footage(path, 5, lambda height, width: (32, 48))
    for _ in read_frames(footage, 32, 48, []):
        pass


def audio(path: Path) -> None:
    """As speech, and as the audio of a video that a clip is joined to."""
    with suppress(SkyrunError):  # most have no video
        joined = read_audio(path)
        for _ in joined.pieces if joined else ():
            pass
    read_speech(path, SPEECH_RATE, TASKS["a2v"].seconds)


def manifest(path: Path) -> None:
    """As `skyrun list` and `skyrun pull` do."""
    stored()
    if (said := Manifest.read(path.parent)) is not None:
        said.is_whole(path.parent)
        said.write(path.parent)


def choices(path: Path) -> None:
    """As a kernel is chosen."""
    choice._tables.clear()
    choice.fastest(torch.device("cpu"), "fuzzed", {"int": int, "float": float})
