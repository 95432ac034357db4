"""Contact sheets: some evenly spaced frames of a clip in one image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from skyrun.media.pixels import Frames

_COLUMNS, _ROWS = 4, 3
_WIDTH = 1600  # of a sheet in pixels, at most
_GAP = 4  # pixels between frames


def places(count: int, most: int = _COLUMNS * _ROWS) -> list[int]:
    """Indices of at most `most` of `count` frames, evenly spaced, with the first and the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(most, count))}) if count else []


def contact_sheet(frames: Sequence[Frames], columns: int = _COLUMNS) -> Image.Image:
    """Arrange frames [H, W, 3] of one size in rows of `columns`, scaled down to fit a screen."""
    height, width = frames[0].shape[:2]
    rows = -(-len(frames) // columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = frame
    image = Image.fromarray(sheet)
    image.thumbnail((_WIDTH, 4 * _WIDTH), Image.Resampling.LANCZOS)
    return image
