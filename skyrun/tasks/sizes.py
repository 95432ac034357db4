"""Size buckets: the height and width of a resolution for an image's aspect ratio."""

import math
from collections.abc import Mapping

from skyrun.errors import SkyrunError

GRID = 16  # 8 pixels per latent, 2 latents per token
WIDE = (9, 16)  # height and width of what a clip is shaped like if it is made from nothing that can be seen

Buckets = Mapping[str, Mapping[str, tuple[int, int]]]

# Per resolution: height / width -> (height, width), as the models were trained. Of equally near ones the first counts.
BUCKETS: Buckets = {
    "480P": {
        "0.38": (392, 1046),
        "0.43": (420, 980),
        "0.48": (444, 925),
        "0.50": (452, 904),
        "0.53": (466, 880),
        "0.54": (470, 870),
        "0.56": (480, 854),
        "0.62": (506, 810),
        "0.67": (522, 784),
        "0.75": (554, 738),
        "1.00": (640, 640),
        "1.33": (740, 555),
        "1.50": (784, 522),
        "1.78": (854, 480),
        "1.89": (880, 466),
        "2.00": (906, 454),
        "2.08": (924, 444),
    },
    "540P": {
        "0.34": (416, 1216),
        "0.38": (464, 1216),
        "0.40": (464, 1152),
        "0.43": (496, 1152),
        "0.48": (496, 1024),
        "0.50": (512, 1024),
        "0.53": (512, 960),
        "0.57": (544, 960),
        "0.60": (544, 912),
        "0.63": (576, 912),
        "0.67": (576, 864),
        "0.72": (624, 864),
        "0.75": (624, 832),
        "0.79": (656, 832),
        "0.84": (656, 784),
        "0.92": (720, 784),
        "1.00": (720, 720),
        "1.09": (784, 720),
        "1.26": (784, 624),
        "1.33": (832, 624),
        "1.40": (832, 592),
        "1.49": (880, 592),
        "1.62": (880, 544),
        "1.78": (960, 544),
        "1.88": (960, 512),
        "2.00": (1024, 512),
        "2.13": (1024, 480),
    },
    "720P": {
        "0.38": (588, 1568),
        "0.43": (628, 1466),
        "0.48": (666, 1388),
        "0.50": (678, 1356),
        "0.53": (698, 1318),
        "0.54": (706, 1306),
        "0.56": (720, 1280),
        "0.62": (758, 1212),
        "0.67": (784, 1176),
        "0.75": (832, 1110),
        "1.00": (960, 960),
        "1.33": (1108, 832),
        "1.50": (1176, 784),
        "1.78": (1280, 720),
        "1.89": (1320, 698),
        "2.00": (1358, 680),
        "2.08": (1386, 666),
    },
}
PORTRAIT_BUCKETS: Buckets = {  # of the talking avatar
    "480P": {
        "0.26": (320, 1216),
        "0.38": (384, 1024),
        "0.50": (448, 896),
        "0.577": (480, 832),
        "0.67": (512, 768),
        "0.82": (576, 704),
        "1.00": (640, 640),
        "1.22": (704, 576),
        "1.50": (768, 512),
        "1.86": (832, 448),
        "1.73": (832, 480),
        "2.00": (896, 448),
        "2.50": (960, 384),
        "2.83": (1088, 384),
        "3.60": (1152, 320),
        "3.80": (1216, 320),
        "4.00": (1280, 320),
    },
    "720P": {
        "0.22": (448, 2048),
        "0.29": (512, 1792),
        "0.36": (576, 1600),
        "0.45": (640, 1408),
        "0.55": (704, 1280),
        "0.56": (720, 1280),
        "0.63": (768, 1216),
        "0.76": (832, 1088),
        "0.88": (896, 1024),
        "1.00": (960, 960),
        "1.14": (1024, 896),
        "1.31": (1088, 832),
        "1.50": (1152, 768),
        "1.58": (1216, 768),
        "1.82": (1280, 704),
        "1.78": (1280, 720),
        "1.91": (1344, 704),
        "2.20": (1408, 640),
        "2.30": (1472, 640),
        "2.67": (1536, 576),
        "2.89": (1664, 576),
        "3.62": (1856, 512),
        "3.75": (1920, 512),
    },
}


def _known(buckets: Buckets, resolution: str) -> Mapping[str, tuple[int, int]]:
    if resolution not in buckets:
        raise SkyrunError(f"unknown resolution {resolution!r}", f"resolutions: {', '.join(buckets)}, or --size HxW")
    return buckets[resolution]


def nearest_bucket(buckets: Buckets, resolution: str, height: int, width: int) -> tuple[int, int]:
    """The size of the bucket whose aspect ratio is nearest to an image's, rounded down to the grid.

    Args:
        buckets: by resolution.
        resolution: one of the buckets' resolutions. Raises SkyrunError for any other.
        height: of the image.
        width: of the image.

    Returns (height, width).
    """
    ratio = height / width
    _, (rows, cols) = min(_known(buckets, resolution).items(), key=lambda item: abs(float(item[0]) - ratio))
    return rows // GRID * GRID, cols // GRID * GRID


def same_area(buckets: Buckets, resolution: str, height: int, width: int) -> tuple[int, int]:
    """The size that has an image's aspect ratio and about as many pixels as the resolution's first bucket.

    Wan's image to video chooses sizes so, with both sides rounded down to the grid. Arguments and results are those of
    `nearest_bucket`.
    """
    rows, cols = next(iter(_known(buckets, resolution).values()))
    area, ratio = rows * cols, height / width
    sides = (math.sqrt(area * ratio), math.sqrt(area / ratio))
    high, wide = (max(1, int(side // 8 // 2)) * GRID for side in sides)
    return high, wide
