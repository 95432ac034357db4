"""A pipeline for every task: a function of a job and of what is finished of it, that yields events."""

from collections.abc import Callable, Iterator

from skyrun.events import Event
from skyrun.pipelines.avatar import talking_avatar
from skyrun.pipelines.extension import video_extension
from skyrun.pipelines.reference import reference_to_video
from skyrun.pipelines.shot import shot_switching

# Called with the job, its run_state.RunState, and an observer, which is shown the input of every linear layer of the
# transformer's blocks. What the state says is finished is not made again, and what is made is put there.
PIPELINES: dict[str, Callable[..., Iterator[Event]]] = {
    "r2v": reference_to_video,
    "v2v": video_extension,
    "shot": shot_switching,
    "a2v": talking_avatar,
}
