"""What distinguishes a task from the others: one value, which everything else asks instead of the task's name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from skyrun.tasks.sizes import Buckets, nearest_bucket
from skyrun.tasks.windows import FRAMES_PER_LATENT, Length, Window

ENCODERS = ("text encoder", "autoencoder")


@dataclass(frozen=True)
class TaskSpec:
    """One thing that a model does.

    does: in a few words, for help. pipeline: the generator that makes its clips, by the name it has in
    `skyrun.pipelines`.

    What it takes. images: fewest and most. image_name: what these are called. video, audio: whether it takes one.
    seconds: shortest and longest clip; whole_seconds: only full ones; takes_frames: a length may be given in frames
    too. most_frames: positions of the model on the time axis, in frames. options: fields of a Request that no task
    has unless it is listed here. transitions: names of cuts, and the tag that says each in a prompt. buckets: sizes
    by resolution.

    How clips are made. fps; steps that the model was distilled for; shift of the sigmas; sampler: a name of
    `skyrun.pipelines.samplers`. windows: the windows of a clip of some length; windowed: a longer clip has more of
    them, not larger ones. condition_frames: how many frames of the video are seen, for a clip of so many frames.

    What it needs. dims: of the published transformer, by the names of `skyrun.kernels.name_tables`. parts: files of a
    model besides the transformer. encoded: what denoising needs of the inputs, by the names in a run's state.
    """

    name: str
    does: str
    pipeline: str
    fps: int
    steps: int
    shift: float
    sampler: str
    seconds: tuple[float, float]
    buckets: Buckets
    windows: Callable[[Length], tuple[Window, ...]]
    dims: Mapping[str, int]
    encoded: frozenset[str]
    condition_frames: Callable[[int], int]
    images: tuple[int, int] = (0, 0)
    image_name: str = "images"
    video: bool = False
    audio: bool = False
    whole_seconds: bool = False
    takes_frames: bool = False
    windowed: bool = False
    most_frames: int | None = None
    options: frozenset[str] = frozenset()
    transitions: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ENCODERS

    @property
    def resolutions(self) -> tuple[str, ...]:
        """Those that it has sizes for."""
        return tuple(self.buckets)

    @property
    def sees_image(self) -> bool:
        """Whether its transformer attends to tokens of an image."""
        return "image" in self.dims

    def frame_count(self, seconds: float) -> int:
        """Frames of a clip of that length: one, and whole groups of four."""
        return round(seconds * self.fps) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1

    def size(self, resolution: str, height: int, width: int) -> tuple[int, int]:
        """(height, width) for an image or video of that shape. SkyrunError for a resolution that it does not have."""
        return nearest_bucket(self.buckets, resolution, height, width)
