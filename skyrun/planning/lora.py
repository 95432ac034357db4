"""An adapter (LoRA) as a user names it: a file and how much of it is added."""

import re
import reprlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?")
_MOST = 100.0


@dataclass(frozen=True)
class Lora:
    """An adapter. path: of the file, or OWNER/NAME/FILE on the hub. strength: what its scale is multiplied by."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.path}:{self.strength!r}"

    def absolute(self) -> "Lora":
        """The same adapter with an absolute path; a name on the hub stays as it is."""
        return self if self.on_hub else replace(self, path=self.path.absolute())

    @property
    def on_hub(self) -> tuple[str, str] | None:
        """(repository, file) if this is OWNER/NAME/FILE, which is no path on this machine."""
        parts = self.path.as_posix().split("/")
        if len(parts) < 3 or parts[0] in ("", ".", "..", "~") or self.path.is_absolute() or self.path.exists():
            return None
        return "/".join(parts[:2]), "/".join(parts[2:])

    @property
    def problem(self) -> str:
        """What is wrong with the strength; "" if nothing is."""
        if isinstance(self.strength, (int, float)) and abs(self.strength) <= _MOST:
            return ""
        return f"{self.path} has a strength of {self.strength!r}, expected a number such as 0.8"


def as_lora(given: Any) -> Lora:
    """An adapter from a Lora, a path, (path, strength), or text as `parse_lora` has it."""
    if isinstance(given, Lora):
        return given
    if isinstance(given, (tuple, list)):
        return Lora(Path(given[0]), *given[1:])
    return parse_lora(given) if isinstance(given, str) else Lora(given)


def lora_problem(given: Any) -> str:
    """Why `as_lora` cannot make an adapter of something; "" if it can."""
    path, *rest = given if isinstance(given, (tuple, list)) and given else (given,)
    numbers = [value for value in rest if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if isinstance(given, Lora) or (isinstance(path, (str, Path)) and len(rest) == len(numbers) in (0, 1)):
        return ""
    return f"lora is {reprlib.repr(given)}, expected a file, FILE:STRENGTH, or (file, strength)"


def parse_lora(text: str) -> Lora:
    """ "FILE" or "FILE:STRENGTH". A file whose whole name is there wins: names may end in a colon and a number."""
    path, colon, strength = text.rpartition(":")
    if colon and path and _NUMBER.fullmatch(strength) and not Path(text).exists():
        return Lora(Path(path), float(strength))
    return Lora(Path(text))
