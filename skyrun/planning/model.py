"""Choose the files of a folder that make up the model of a task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from skyrun.errors import BAD_INPUT, MODEL_MISSING, SkyrunError
from skyrun.kernels.files.gguf_file import GGUFFile
from skyrun.models.clip import CLIPVision
from skyrun.models.dit_header import DiTDims, canonical_tensors, read_dims
from skyrun.models.folder import CONVERT, ModelFiles, ModelFolder, main_type
from skyrun.models.umt5 import UMT5
from skyrun.models.vae import check_vae, read_vae_dims
from skyrun.models.wav2vec2 import check_wav2vec2
from skyrun.planning.adapters import open_adapters
from skyrun.planning.lora import Lora
from skyrun.tasks import TaskSpec, find_spec, tasks_in

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """The files of a model for a task. Their headers have been checked.

    spec: the TaskSpec of the task with this model. others: transformers in the folder that could be used instead.
    passed_over: which files were not used, and why. guess: a sentence if it was not certain which model it is.
    """

    spec: TaskSpec
    files: ModelFiles
    encoder: UMT5
    vision: CLIPVision | None
    dims: DiTDims
    others: tuple[GGUFFile, ...] = ()
    passed_over: tuple[str, ...] = ()
    guess: str = ""

    def with_type(self, spec: TaskSpec, weight_type: str) -> "Model":
        """The same model with another of its transformers, which is checked as well."""
        transformer = next(file for file in self.others if main_type(file) == weight_type)
        dims = _checked_transformer(transformer, spec, self.encoder, self.vision)
        others = (self.files.transformer, *(file for file in self.others if file is not transformer))
        return replace(self, files=replace(self.files, transformer=transformer), dims=dims, others=others)

    def adapted(self, loras: Sequence[Lora]) -> "Model":
        """The same model with what of these adapters fits it. SkyrunError if one of them cannot be used."""
        shapes = {name: info.shape for name, info in canonical_tensors(self.files.transformer).items()}
        return replace(self, files=replace(self.files, adapters=open_adapters(loras, shapes)))


def choose_model(folder: ModelFolder, spec: TaskSpec, quant: str | None = None) -> Model:
    """Choose the model of a task: of several transformers the one with the most bits, unless `quant` names another.

    A file whose metadata names a task is used for that task only; any other file is used if its shapes fit. Raises
    SkyrunError with code 4 if parts are missing, and SkyrunError if the tensors of the chosen files are not valid.
    """
    passed_over: list[str] = []
    spec = _spec_of(folder, spec)
    fitting = _for_task(folder, spec, passed_over) if folder.transformers else []
    _check_complete(folder, spec)
    transformer = fitting[0] if quant is None else _of_type(fitting, quant, folder.path)
    dims = read_dims(transformer)
    encoder = _first(folder.ggufs["text encoder"], lambda file: _text_encoder(file, dims), passed_over)
    vision, audio = None, None
    if "image encoder" in spec.parts:
        vision = _first(folder.ggufs["image encoder"], lambda file: _image_encoder(file, dims), passed_over)
    if "audio encoder" in spec.parts:
        audio = folder.safetensors["audio encoder"][0]
        check_wav2vec2(audio)
    vae = _first(folder.safetensors["autoencoder"], _autoencoder, passed_over)
    dims = _checked_transformer(transformer, spec, encoder, vision)
    encoder.check()
    check_vae(vae)
    if vision is not None:
        vision.check()
    files = ModelFiles(transformer, encoder.file, vae, vision.file if vision else None, audio)
    found, guess = published_spec(transformer, spec)
    same = _of_model(fitting, found, passed_over) if quant is None else []
    others = tuple(file for file in same if file is not transformer)
    return Model(found, files, encoder, vision, dims, others, tuple(passed_over), guess)


def _spec_of(folder: ModelFolder, spec: TaskSpec) -> TaskSpec:
    """The TaskSpec of the model in a folder whose files state another task, if that is what it has for this one."""
    stated = [str(file.metadata.get("skyrun.task", "")) for file in folder.transformers]
    if spec.name in stated:
        return spec
    found = [_known(file, spec) for file in folder.transformers]
    return next((own for own in found if own is not None and own.file_task in stated), spec)


def _known(file: GGUFFile, spec: TaskSpec, **sizes: int) -> TaskSpec | None:
    """The TaskSpec of the task with the model that a file says to be, or that it or its folder is named after."""
    names = (str(file.metadata.get("general.name", "")), file.path.stem, file.path.parent.name)
    found = (find_spec(spec.name, name, sizes) for name in names)
    return next((model for model, is_certain in found if is_certain), None)


def _of_model(files: Sequence[GGUFFile], spec: TaskSpec, passed_over: list[str]) -> list[GGUFFile]:
    """The transformers that are of one model, where several models do the task."""
    same = []
    for file in files:
        own = _known(file, spec)
        if own is None or own is spec:
            same.append(file)
        else:
            passed_over.append(f"{file.path.name} is {own.title}, another model than {spec.title}")
    return same


def published_spec(file: GGUFFile, spec: TaskSpec) -> tuple[TaskSpec, str]:
    """The TaskSpec of the task with the model that a transformer is, and a sentence if that is not certain."""
    dims = read_dims(file)
    sizes = {"dim": dims.dim, "layers": dims.layers, "in": dims.in_channels, "image": dims.image_dim}
    if (known := _known(file, spec, **sizes)) is not None:
        return known, ""
    taken, _ = find_spec(spec.name, "", sizes)
    return taken, f"{file.path.name} does not say which model it is: it is taken for {taken.title}"


def _check_complete(folder: ModelFolder, spec: TaskSpec) -> None:
    missing = [f"{folder.path} has no {role}" for role in ("transformer", *spec.parts) if not folder.has(role)]
    if not missing:
        return
    code = BAD_INPUT if folder.unreadable else MODEL_MISSING
    if (folder.path / "transformer").is_dir():
        missing.append(f"{folder.path} is a published checkpoint, which has to be converted first")
    raise SkyrunError.listing("the model is not complete", [*folder.unreadable, *missing], CONVERT, code)


def _for_task(folder: ModelFolder, spec: TaskSpec, passed_over: list[str]) -> list[GGUFFile]:
    """Transformers for the task: those whose metadata names it, or else those that name no task and fit."""
    tasks = {file: str(file.metadata.get("skyrun.task", "")) for file in folder.transformers}
    named = spec.file_task or spec.name
    stated = [file for file, task in tasks.items() if task == named]
    silent = [file for file, task in tasks.items() if not task]
    for file, task in tasks.items():
        if task and task != named and (stated or silent):
            passed_over.append(f"{file.path.name} is a model for {task}")
    if stated:
        passed_over += [f"{file.path.name} does not say its task" for file in silent]
        return stated
    if not silent:
        file, task = next(iter(tasks.items()))
        raise SkyrunError(f"{file.path} is a model for {task}, not for {spec.name}", f"use it with `skyrun run {task}`")
    if folder.named is not None:
        return silent
    reasons = {file: _misfit(file, spec) for file in silent}
    fitting = [file for file, reason in reasons.items() if not reason]
    if fitting:
        passed_over += [reason for reason in reasons.values() if reason]
        return fitting
    raise SkyrunError.listing(
        f"{folder.path} has no transformer for {spec.name}",
        [reason for reason in reasons.values() if reason],
        "use a model for this task, or name the file itself with --model",
    )


def _misfit(file: GGUFFile, spec: TaskSpec) -> str:
    """Why a file that names no task does not fit this one, judged by its shapes and then by its name; "" if it fits."""
    try:
        dims = read_dims(file)
    except SkyrunError:
        return ""  # reported in full if this file is chosen
    if problem := _shape_problem(dims, spec):
        return f"{file.path.name} {problem}"
    named = tasks_in(file.path.name)
    return f"{file.path.name} is a model for {named[-1]}, by its name" if named and spec.name not in named[-1:] else ""


def _of_type(transformers: Sequence[GGUFFile], quant: str, folder: Path) -> GGUFFile:
    by_recipe = {str(file.metadata.get("skyrun.quant", main_type(file))): file for file in reversed(transformers)}
    there = {main_type(file): file for file in reversed(transformers)} | by_recipe
    if quant.upper() not in there:
        raise SkyrunError(f"{folder} has no {quant} transformer", f"it has {', '.join(by_recipe)}", MODEL_MISSING)
    return there[quant.upper()]


def _first(files: Sequence[T], use: Callable[[T], "Used"], passed_over: list[str]) -> "Used":
    """The result of `use` for the first file that it accepts. If it refuses all files, its first error is raised."""
    refusals: list[SkyrunError] = []
    for file in files:
        try:
            used = use(file)
        except SkyrunError as error:
            refusals.append(error)
            continue
        passed_over += [refusal.message for refusal in refusals]
        return used
    raise refusals[0]


Used = TypeVar("Used")


def _text_encoder(file: GGUFFile, dims: DiTDims) -> UMT5:
    encoder = UMT5(file)
    if encoder.dim != dims.text_dim:
        raise SkyrunError(
            f"{file.path} makes embeddings of {encoder.dim}, the transformer expects {dims.text_dim}",
            "use the text encoder that was converted with this model",
        )
    return encoder


def _image_encoder(file: GGUFFile, dims: DiTDims) -> CLIPVision:
    vision = CLIPVision(file)
    if vision.dim != dims.image_dim:
        raise SkyrunError(
            f"{file.path} makes tokens of {vision.dim}, the transformer expects {dims.image_dim}",
            "use the image encoder that was converted with this model",
        )
    return vision


def _autoencoder(path: Path) -> Path:
    read_vae_dims(path)
    return path


def _checked_transformer(file: GGUFFile, spec: TaskSpec, encoder: UMT5, vision: CLIPVision | None) -> DiTDims:
    dims = read_dims(file)
    if problem := _shape_problem(dims, spec):
        raise SkyrunError(f"{file.path} {problem}", f"use a model for {spec.name}")
    encoders = [("text", encoder.dim, dims.text_dim)]
    if vision is not None:
        encoders.append(("image", vision.dim, dims.image_dim))
    for name, encoder_dim, own in encoders:
        if encoder_dim != own:
            raise SkyrunError(
                f"{file.path} expects {name} embeddings of {own}, the {name} encoder makes {encoder_dim}",
                f"use the {name} encoder that was converted with this model",
            )
    return dims


def _shape_problem(dims: DiTDims, spec: TaskSpec) -> str:
    wanted = spec.dims["in"]
    if dims.in_channels != wanted:
        return f"takes {dims.in_channels} channels, {spec.name} has {wanted}"
    if bool(dims.image_dim) != spec.sees_image:
        has, needs = ("an", "none") if dims.image_dim else ("no", "one")
        return f"has {has} image input, {spec.name} needs {needs}"
    return ""
