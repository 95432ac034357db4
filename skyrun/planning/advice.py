"""What a person should know of a clip before it is made, though nothing is wrong with it."""

from collections.abc import Iterator

_TRAINED_SECONDS = 5.1  # of a window, with a frame to spare; the position of a later frame was never seen in training
_OBLONG = 1.2  # the longer side by the shorter one, from which on a shape is wide or high


def turned(height: int, width: int, shape: tuple[int, int]) -> Iterator[str]:
    """A clip that is high where what it is made from is wide, or the other way: perhaps the sides were exchanged."""
    rows, cols = shape
    if (height > _OBLONG * width and cols > _OBLONG * rows) or (width > _OBLONG * height and rows > _OBLONG * cols):
        clip, image = ("high", "wide") if height > width else ("wide", "high")
        yield (
            f"the clip is {clip}, {height} high and {width} wide, but what it is made from is {image}; "
            f"--size takes the height first, --size {width}x{height} would be {image}"
        )


def too_long(windows: int, seconds: float) -> Iterator[str]:
    """A clip that is made at once and longer than those that the model was trained on."""
    if windows == 1 and seconds > _TRAINED_SECONDS:
        yield (
            f"the model was not made for {seconds:.1f} s at once, it was trained on 5 s: expect repetition and drift"
        )
