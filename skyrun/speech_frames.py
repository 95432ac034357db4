"""Samples of speech and frames of video. Nothing here reads sound."""

import math

from skyrun.tasks import TASKS

RATE = 16000  # samples per second
FPS = TASKS["a2v"].fps


def frame_count(samples: int) -> int:
    """Frames of video that so many samples take; the last may have less sound than the others."""
    return math.ceil(samples / RATE * FPS)
