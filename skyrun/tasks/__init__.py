"""What the models do, and how: a TaskSpec for each task, sizes, windows. Nothing here imports torch."""

import re

from skyrun.tasks.skyreels_v3 import REFERENCE_TO_VIDEO, SHOT_SWITCHING, TALKING_AVATAR, VIDEO_EXTENSION
from skyrun.tasks.spec import TaskSpec

TASKS: dict[str, TaskSpec] = {
    spec.name: spec for spec in (REFERENCE_TO_VIDEO, VIDEO_EXTENSION, SHOT_SWITCHING, TALKING_AVATAR)
}


def tasks_in(text: str) -> list[str]:
    """The tasks that words of a path name: models of one shape are told apart by nothing else."""
    words = {word.lower() for word in re.split(r"[^A-Za-z0-9]+", text)}
    return [name for name in TASKS if name in words]


__all__ = ["TASKS", "TaskSpec", "tasks_in"]
