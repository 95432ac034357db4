"""TaskSpec: everything that differs between tasks, so that no other code compares a task's name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from skyrun.tasks.sizes import Buckets, nearest_bucket
from skyrun.tasks.windows import FRAMES_PER_LATENT, Length, Window

ENCODERS = ("text encoder", "autoencoder")
NAG = 11.0  # the usual scale of normalized attention guidance with Wan's transformer, as its users have it
_SMALL_AREA = 480 * 854  # pixels of 480P


@dataclass(frozen=True)
class TaskSpec:
    """One task of a model.

    name: as in `skyrun run NAME`. does: a few words for the help. pipeline: name of its generator in
    `skyrun.pipelines`.

    Several models may do a task, each with a TaskSpec of its own. model: its name in the table of sources. title: what
    its repository is called. resolution: the usual one. usual_seconds: length of a clip if none is given. sizing: a
    function that chooses the size of a clip.

    Inputs. images: the least and most that it takes. image_name: how messages call them. image_fit: how an image is
    brought to the clip's size, as in `skyrun.media.pixels.first_frame`. video, audio: whether it takes one. seconds:
    the shortest and longest clip. whole_seconds: whether a length must be whole seconds. takes_frames: whether a length
    may be given in frames. most_frames: the longest clip that the model's positions on the time axis allow. options:
    fields of a Request that only the tasks that list them accept. transitions: names of cuts, with the tag of each in a
    prompt. buckets: sizes by resolution.

    Denoising. fps: of clips; rates: those that the model can be told to make. steps: that the model was made for.
    shift: of the sigmas; small_shift: for 480P. guidance: scale of classifier-free guidance, None where it is distilled
    into the model. negative: the negative prompt. sampler: its name in `skyrun.pipelines.samplers`. windows: a function
    that returns the windows of a clip. windowed: whether a longer clip has more windows instead of larger ones.
    window_frames: the usual length of a window. condition_frames: a function that returns, for the number of frames of
    a clip, how many frames of the video, or of the window before, it is conditioned on.

    Models. file_task: the task that its files state, if it is not this one. dims: of the published transformer, by the
    names in `skyrun.kernels.name_tables`. parts: roles of the files besides the transformer. encoded: names of the
    encoded inputs in a RunState that denoising needs.
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
    model: str = ""
    title: str = ""
    resolution: str = "480P"
    usual_seconds: float = 5.0
    sizing: Callable[[Buckets, str, int, int], tuple[int, int]] = nearest_bucket
    small_shift: float | None = None
    guidance: float | None = None
    negative: str = ""
    rates: tuple[int, ...] = ()
    images: tuple[int, int] = (0, 0)
    image_name: str = "images"
    video: bool = False
    audio: bool = False
    whole_seconds: bool = False
    takes_frames: bool = False
    image_fit: str = "lanczos"
    window_frames: int = Length.window_frames
    file_task: str = ""
    windowed: bool = False
    most_frames: int | None = None
    options: frozenset[str] = frozenset()
    transitions: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ENCODERS

    @property
    def resolutions(self) -> tuple[str, ...]:
        """The resolutions that it has sizes for."""
        return tuple(self.buckets)

    @property
    def sees_image(self) -> bool:
        """Whether its transformer attends to tokens of an image."""
        return "image" in self.dims

    def frame_count(self, seconds: float, fps: int | None = None) -> int:
        """Frames of a clip of that length: one plus whole groups of four."""
        return round(seconds * (fps or self.fps)) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1

    def size(self, resolution: str, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a clip for an image or video of that size. SkyrunError for an unknown resolution."""
        return self.sizing(self.buckets, resolution, height, width)

    def shift_of(self, resolution: str, size: tuple[int, int] | None) -> float:
        """The shift of the sigmas for a clip of that resolution or size."""
        area = size[0] * size[1] if size else 0
        small = area <= _SMALL_AREA if size else resolution == "480P"
        return self.small_shift if small and self.small_shift is not None else self.shift
