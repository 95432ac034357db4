"""Samples of speech and frames of video. Nothing here reads sound."""

import math

RATE = 16000  # samples per second
FPS = 25  # frames of a talking avatar


def frame_count(samples: int) -> int:
    """Frames of video that so many samples take; the last may have less sound than the others."""
    return math.ceil(samples / RATE * FPS)
