"""A clip at a glance: some of its frames, evenly spread, side by side."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from skyrun.media.pixels import Frames

_COLUMNS, _ROWS = 4, 3
_WIDTH = 1600  # pixels of a sheet, at most
_GAP = 4


def places(count: int, most: int = _COLUMNS * _ROWS) -> list[int]:
    """Numbers of at most `most` frames of `count`, evenly spread, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(most, count))}) if count else []


def contact_sheet(frames: Sequence[Frames], columns: int = _COLUMNS) -> Image.Image:
    """Frames [H, W, 3] of one size in rows of `columns`, scaled down to a sheet that fits a screen."""
    height, width = frames[0].shape[:2]
    rows = -(-len(frames) // columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = frame
    image = Image.fromarray(sheet)
    image.thumbnail((_WIDTH, 4 * _WIDTH), Image.Resampling.LANCZOS)
    return image
