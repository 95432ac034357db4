"""The error that a user meets, and the exit codes of the command line."""

from skyrun.kernels.errors import BAD_INPUT, FAILED, INTERRUPTED, MODEL_MISSING, WILL_NOT_FIT, SkyrunError

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "MODEL_MISSING", "WILL_NOT_FIT", "OutOfMemory", "SkyrunError"]


class OutOfMemory(SkyrunError):
    """A failed allocation.

    cause: what refused it says. stage: which it was in; "" before the first. device: the number of the device among
    several; None if there is one.
    """

    def __init__(self, cause: str, stage: str = "", device: int | None = None) -> None:
        where = "" if device is None else f" on device {device}"
        hint = "use a smaller --resolution or --size or fewer --seconds, or close other programs"
        super().__init__(f"out of memory{where}: {cause}", hint, WILL_NOT_FIT)
        self.cause, self.stage, self.device = cause, stage, device
