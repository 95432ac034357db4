"""A pipeline for every task: a function of a job and of what is finished of it, that yields events."""

from collections.abc import Callable, Iterator

from skyrun.events import Event
from skyrun.pipelines.avatar import talking_avatar
from skyrun.pipelines.extension import video_extension
from skyrun.pipelines.reference import reference_to_video
from skyrun.pipelines.shot import shot_switching

# By the names that task specs call them by. Called with the job, its state.RunState, and an observer, which is shown
# the input of every linear layer of the transformer's blocks. What the state says is finished is not made again, and
# what is made is put there.
PIPELINES: dict[str, Callable[..., Iterator[Event]]] = {
    pipeline.__name__: pipeline for pipeline in (reference_to_video, video_extension, shot_switching, talking_avatar)
}
