"""What the models do, and how: a TaskSpec for each task, sizes, windows. Nothing here imports torch."""

from skyrun.tasks.skyreels_v3 import REFERENCE_TO_VIDEO, SHOT_SWITCHING, TALKING_AVATAR, VIDEO_EXTENSION
from skyrun.tasks.spec import TaskSpec

TASKS: dict[str, TaskSpec] = {
    spec.name: spec for spec in (REFERENCE_TO_VIDEO, VIDEO_EXTENSION, SHOT_SWITCHING, TALKING_AVATAR)
}

__all__ = ["TASKS", "TaskSpec"]
