"""Find the model that a command needs on this machine."""

from pathlib import Path

from skyrun.hub.built_in import built_in_folder
from skyrun.hub.store import Name, parse_name, pulled
from skyrun.tasks.sources import BUILT_IN, SOURCES


def wanted_name(model: str | None, task: str, quant: str | None) -> Name | None:
    """The name of the model to make a clip with; None if `model` is a path.

    Args:
        model: The name or path that was given; None stands for the model of the task.
        task: The task of the clip.
        quant: The type that was asked for.
    """
    if model is not None and (Path(model).exists() or not _is_name(model)):
        return None
    return parse_name(model or task, quant, task)


def _is_name(text: str) -> bool:
    """Whether a text is a name and not a path. OWNER/NAME is a name only with a type."""
    return text in SOURCES or text in BUILT_IN or (":" in text and not Path(text).is_absolute())


def whole_folder(name: Name) -> Path | None:
    """The folder of a complete model; None if it has to be downloaded. A model that is built in is converted."""
    if name.repo in BUILT_IN:
        return built_in_folder(name)
    found = pulled(name)
    return found[0][0] if found and found[0][1].is_whole(found[0][0]) else None


def model_path(model: Path) -> Path:
    """The folder of a model that is named and is on this machine or built in; any other text is a path itself."""
    name = None if model.exists() or not _is_name(str(model)) else parse_name(str(model))
    return (whole_folder(name) if name else None) or model
