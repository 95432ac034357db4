"""A repository of GGUF files: what each of them is, by what it says of itself, and which of them make up a model."""

import re
import struct
from dataclasses import dataclass

from skyrun.errors import BAD_INPUT, MODEL_MISSING, SkyrunError
from skyrun.hub.client import RemoteFile, Repository, read_start
from skyrun.tasks import TASKS

_HEAD = 1 << 16  # bytes in which everything stands that decides; a tokenizer comes after it
_ROLES = {"wan": "transformer", "t5encoder": "text_encoder", "t5": "text_encoder", "clip": "image_encoder"}
_SAFETENSORS = {b'"decoder.conv1.weight"': "vae", b"feature_extractor.conv_layers": "audio_encoder"}
_STRING = 8  # GGUF's number for the type
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_TYPE_IN_NAME = re.compile(r"(?<![A-Z0-9])(I?Q\d(_[A-Z0-9]+)*|BF16|F16|F32)(?![A-Z0-9])")
_ENCODER_QUANT = "Q8_0"  # the smallest with which encoders are as good as unchanged


@dataclass(frozen=True)
class RemoteModel:
    """A file that is used as it is. quant: as it says, or as its name does; task: "" where nothing tells."""

    file: RemoteFile
    role: str
    quant: str
    task: str


def look(repository: Repository) -> list[RemoteModel]:
    """The files of a repository that need no conversion. Reads the beginning of each."""
    found = []
    for file in repository.files:
        if file.name.endswith(".gguf"):
            head = read_start(file, _HEAD)
            role = _ROLES.get(_text(head, "general.architecture"), "")
            quant = _text(head, "skyrun.quant") or _type_in(file.name)
            found.append(RemoteModel(file, role, quant, _text(head, "skyrun.task")))
        elif file.name.endswith(".safetensors") and not file.folder:
            head = read_start(file, _HEAD)
            role = next((role for mark, role in _SAFETENSORS.items() if mark in head), "")
            if role == "vae" or b'"skyrun"' in head:  # other names of tensors have to be converted
                found.append(RemoteModel(file, role, "", ""))
    return [model for model in found if model.role]


def quants(models: list[RemoteModel]) -> list[str]:
    """The types that transformers have."""
    return sorted({model.quant for model in models if model.role == "transformer"})


def choose(repo: str, models: list[RemoteModel], quant: str, task: str) -> list[RemoteModel]:
    """One file for each role that is there. SkyrunError if there is no transformer of the type, or several."""
    transformers = [model for model in models if model.role == "transformer"]
    fitting = [model for model in transformers if model.quant == quant and (not task or model.task in ("", task))]
    if task and len(fitting) > 1:
        fitting = [model for model in fitting if _task_of(model) == task] or fitting
    if not fitting:
        what = f"{quant} transformer" + f" for {task}" * bool(task)
        raise SkyrunError(f"{repo} has no {what}", f"it has {', '.join(quants(models))}", MODEL_MISSING)
    if len(fitting) > 1:
        names = ", ".join(model.file.path for model in fitting)
        hint = "fetch one of them by hand, and give its path with --model"
        raise SkyrunError(f"{repo} has several {quant} transformers: {names}", hint, BAD_INPUT)
    if _SPLIT.search(fitting[0].file.name):
        hint = "choose another type or repository, or join them with llama-gguf-split --merge"
        raise SkyrunError(f"{repo} has its {quant} transformer in several files", hint, BAD_INPUT)
    chosen = {"transformer": fitting[0]}
    for model in sorted(models, key=lambda model: (model.quant not in (_ENCODER_QUANT, ""), -model.file.nbytes)):
        chosen.setdefault(model.role, model)
    return list(chosen.values())


def _task_of(model: RemoteModel) -> str:
    return model.task or next((task for task in TASKS if task in model.file.name.lower()), "")


def _type_in(name: str) -> str:
    found = [match[0] for match in _TYPE_IN_NAME.finditer(name.upper())]
    return found[-1] if found else ""


def _text(head: bytes, key: str) -> str:
    """A text of the metadata, "" if it does not stand in these bytes."""
    at = head.find(struct.pack("<Q", len(key)) + key.encode())
    if at < 0:
        return ""
    at += 8 + len(key)
    try:
        kind, length = struct.unpack_from("<IQ", head, at)
        return head[at + 12 : at + 12 + length].decode("utf-8") if kind == _STRING else ""
    except (struct.error, UnicodeDecodeError):
        return ""
