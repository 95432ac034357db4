"""One pipeline per task: a generator of events that takes a job and a RunState with what is already finished."""

from collections.abc import Callable, Iterator

from skyrun.events import Event
from skyrun.pipelines.avatar import talking_avatar
from skyrun.pipelines.extension import shot_switching, video_extension
from skyrun.pipelines.forcing import diffusion_forcing
from skyrun.pipelines.generation import image_to_video, text_to_video
from skyrun.pipelines.reference import reference_to_video

# By the names in TaskSpec.pipeline. A pipeline is called with the job, its RunState, and an optional observer, which is
# called with the input of every linear layer in the transformer's blocks. It skips what the state already has and
# stores in it what it makes.
PIPELINES: dict[str, Callable[..., Iterator[Event]]] = {
    pipeline.__name__: pipeline
    for pipeline in (
        reference_to_video,
        video_extension,
        shot_switching,
        talking_avatar,
        text_to_video,
        image_to_video,
        diffusion_forcing,
    )
}
