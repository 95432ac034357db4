"""The four things that SkyReels-V3 does: what each takes and what it makes. Nothing here imports torch."""

from dataclasses import dataclass

MAX_REFERENCES = 4
MAX_LATENT_FRAMES = 1024 - MAX_REFERENCES  # positions that reference-to-video has on the time axis
CONDITION_FRAMES = 25  # of a video, that its extension goes on from
WINDOW_FRAMES = 81  # of a talking avatar
CONNECTION = "a person is talking"  # what a talking avatar's later windows are told

# Ways to get to the next shot, and how a prompt says so. The first two tags are in the model's own documentation, the
# others are those that its users write.
TRANSITIONS = {
    "cut-in": "[ZOOM_IN_CUT]",
    "cut-out": "[ZOOM_OUT_CUT]",
    "shot-reverse-shot": "[SHOT_REVERSE_SHOT]",
    "multi-angle": "[MULTI_ANGLE]",
    "cut-away": "[CUT_AWAY]",
}


@dataclass(frozen=True)
class Task:
    """images: fewest and most of them. seconds: shortest and longest clip; whole: only full seconds.

    frames: a clip's length may be given in frames too. options: of a Request, which no other task has.
    """

    does: str
    fps: int
    steps: int
    seconds: tuple[float, float]
    images: tuple[int, int] = (0, 0)
    video: bool = False
    audio: bool = False
    whole: bool = False
    frames: bool = False
    resolutions: tuple[str, ...] = ("480P", "540P", "720P")
    options: frozenset[str] = frozenset()


TASKS = {
    "r2v": Task(
        "a clip that shows what is in one to four pictures",
        fps=24,
        steps=8,
        seconds=(0.0, (MAX_LATENT_FRAMES - 1) * 4 // 24),
        images=(1, MAX_REFERENCES),
        frames=True,
    ),
    "v2v": Task(
        "how a video goes on, 5 to 30 seconds of it",
        fps=24,
        steps=8,
        seconds=(5, 30),
        video=True,
        whole=True,
        options=frozenset({"join", "condition_frames", "latent_rate"}),
    ),
    "shot": Task(
        "the next shot after a video, 2 to 5 seconds of it",
        fps=24,
        steps=8,
        seconds=(2, 5),
        video=True,
        whole=True,
        frames=True,
        options=frozenset({"join", "transition", "condition_frames"}),
    ),
    "a2v": Task(
        "a portrait that says what a recording says",
        fps=25,
        steps=4,
        seconds=(0.4, 200),
        images=(1, 1),
        audio=True,
        resolutions=("480P", "720P"),
        options=frozenset({"window_frames"}),
    ),
}


def frames_of(seconds: float) -> int:
    """Frames of a clip at 24 a second: one, and whole groups of four."""
    return round(seconds * 24) // 4 * 4 + 1


def usual_condition_frames(task: str, frames: int) -> int:
    """Frames of the video that are seen: of the next shot of `frames` the more the longer it is."""
    return min(33, max(9, 8 * round((frames - 1) / 24) - 7)) if task == "shot" else CONDITION_FRAMES
