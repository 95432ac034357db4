"""What the models do, and how: a TaskSpec for each task, sizes, windows. Nothing here imports torch."""

import re
from collections.abc import Mapping

from skyrun.tasks.skyreels_v3 import REFERENCE_TO_VIDEO, SHOT_SWITCHING, TALKING_AVATAR, VIDEO_EXTENSION
from skyrun.tasks.spec import TaskSpec
from skyrun.tasks.wan import WAN_SPECS

_SPECS = (REFERENCE_TO_VIDEO, VIDEO_EXTENSION, SHOT_SWITCHING, TALKING_AVATAR, *WAN_SPECS)

# By task, the models that do it; the usual one comes first.
MODELS: dict[str, tuple[TaskSpec, ...]] = {
    name: tuple(spec for spec in _SPECS if spec.name == name) for name in dict.fromkeys(spec.name for spec in _SPECS)
}
TASKS: dict[str, TaskSpec] = {name: models[0] for name, models in MODELS.items()}


def tasks_in(text: str) -> list[str]:
    """The tasks that words of a path name: models of one shape are told apart by nothing else."""
    words = _words(text)
    return [name for name in TASKS if name in words]


def spec_of(task: str, model: str | None = None) -> TaskSpec:
    """The TaskSpec of a task with the model of that name; with the usual one if there is none of that name."""
    return next((spec for spec in MODELS[task] if spec.model == model), TASKS[task])


def find_spec(task: str, text: str, dims: Mapping[str, int]) -> tuple[TaskSpec, bool]:
    """The TaskSpec of the model that a file holds, and whether its family is certain.

    Args:
        task: that the file is used for.
        text: words about the file: what it says to be, or its name.
        dims: of its transformer, as in TaskSpec.dims; those that are not given may be any.
    """
    fitting = [spec for spec in MODELS[task] if all(spec.dims.get(name, 0) == size for name, size in dims.items())]
    words = _words(text)
    best = max(fitting or MODELS[task], key=lambda spec: len(words & _words(spec.title)))
    family = re.split(r"[^A-Za-z0-9]+", best.title.lower())[0]
    return best, len(MODELS[task]) == 1 or family in words


def _words(text: str) -> set[str]:
    return {word.lower() for word in re.split(r"[^A-Za-z0-9]+", text)}


__all__ = ["MODELS", "TASKS", "TaskSpec", "find_spec", "spec_of", "tasks_in"]
