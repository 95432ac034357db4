"""Durations, sizes, tables, and what comes from outside as text."""

import unicodedata
from collections.abc import Sequence

GIB = 1 << 30


def duration(seconds: float) -> str:
    """ "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(nbytes: float) -> str:
    """ "812 kB", "2.3 MB", "14.1 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


# Control characters, formats such as a change of direction, halves of characters, separators of lines.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_HARMLESS = "\n\u200c\u200d"  # line breaks, and what joins letters and emoji


def printable(text: str) -> str:
    """The text with everything escaped that could move a terminal's cursor, change its state, or hide other text."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _UNPRINTABLE and character not in _HARMLESS
        else character
        for character in text
    )
