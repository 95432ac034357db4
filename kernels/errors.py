"""The one exception that users see. It lives in the lowest package so that every package can raise it."""

_LONGEST = 2000  # characters of a sentence; what files say may be of any length
_MOST = 20 * _LONGEST  # of a message

FAILED, BAD_INPUT, WILL_NOT_FIT, MODEL_MISSING, INTERRUPTED = 1, 2, 3, 4, 130


class SkyrunError(Exception):
    """A failure: a sentence about it, a next step, and the exit code of the command line.

    message: what was received and what was expected. hint: what to type or change next.
    code: 1 failed, 2 bad input, 3 will not fit, 4 a model is missing, 130 interrupted.
    """

    def __init__(self, message: str, hint: str = "", code: int = BAD_INPUT) -> None:
        message = _shortened("\n".join(_shortened(line, _LONGEST) for line in message.split("\n")), _MOST)
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    @classmethod
    def listing(cls, title: str, problems: list[str], hint: str = "", code: int = BAD_INPUT) -> "SkyrunError":
        """All problems in one error. A single problem is shown without the title."""
        if len(problems) == 1:
            return cls(problems[0], hint, code)
        return cls(f"{title}:\n" + "\n".join(f"  - {problem}" for problem in problems), hint, code)


def _shortened(text: str, most: int) -> str:
    """The beginning and the end of a longer text: where it was found, and what was expected."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"
