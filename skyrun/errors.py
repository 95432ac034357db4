"""The error that a user meets, and the exit codes of the command line."""

from skyrun.kernels.errors import BAD_INPUT, FAILED, INTERRUPTED, MODEL_MISSING, WILL_NOT_FIT, SkyrunError

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "MODEL_MISSING", "WILL_NOT_FIT", "SkyrunError"]
