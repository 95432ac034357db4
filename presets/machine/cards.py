"""Find a card by the name that people or drivers use, or explain why there is none."""

import re
from collections import defaultdict
from dataclasses import replace
from difflib import get_close_matches
from functools import cache

from skyrun.presets.machine.card import Card, Rates, link_rate
from skyrun.presets.machine.card_table import CARDS

__all__ = ["CARDS", "Card", "Rates", "card_like", "card_rows", "find_card", "link_rate", "why_unknown"]

_WORD = re.compile(r"titan|pro|ti|super|laptop|rtx|gtx|[a-z]+|\d+")
_MEMORY = re.compile(r"(?:(?<![a-z0-9.])|(?<=ti)|(?<=super))(\d+(?:\.\d+)?) ?(?:gib|gb|g)(?![a-z0-9])")
_MEMORY_KIND = re.compile(r"\b(hbm|gddr)\d\w*")
_SAME = (  # spellings of one word
    (re.compile(r"max-? ?q"), "maxq"),
    (re.compile(r"\b(mobile|notebook)\b"), "laptop"),
    (re.compile(r"sxm\d?"), "sxm"),
    (re.compile(r"\bdgx spark\b"), "gb10"),
)
_IGNORED = {
    *("nvidia", "geforce", "tesla", "rtx", "gpu", "graphics", "card", "tensor", "core", "with", "design"),
    *("edition", "generation", "blackwell", "workstation", "server", "desktop"),
}
_FORMS = {"sxm", "pcie", "nvl"}  # needed to tell some server cards apart, and ignored for others

_Words = frozenset[str]

# Names of cards that skyrun makes no plans for. The first pattern that matches decides.
_OTHERS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\bamd\b|radeon|instinct|ryzen|\brx\b|\brx ?\d|\bmi ?\d{2,3}|\bvega|\d{4} ?(xtx?|gre)\b", "AMD"),
        (r"\bintel\b|\barc\b|\biris\b|\b[ab][3-7][1-8]0m?\b", "Intel"),
        (r"\bapple\b|\bmac|\bm[1-9]\b", "Apple"),
        (r"\bgtx|\bgt ?\d|\bmx ?\d|\b(9[5-8]0|10[1-8]0|16[1-6]0)\b", "GTX"),
        (r"\bp(4|6|40|100)\b|\bm(4|6|10|40|60)\b|\bk(10|20|40|80)\b|\btitan x|\bquadro\b|\b[kmp]\d{3,4}\b", "GTX"),
    )
)
_REASONS = {
    "AMD": "is made by AMD: skyrun runs on NVIDIA cards, not on ROCm; without one a clip takes days on the CPU",
    "Intel": "is made by Intel: skyrun runs on NVIDIA cards, not on XPU; without one a clip takes days on the CPU",
    "Apple": "is made by Apple: skyrun runs on NVIDIA cards, not on Metal; without one a clip takes days on the CPU",
    "GTX": "has no tensor cores, and without them a clip takes days: skyrun plans for RTX cards, from an RTX 2060 on",
}


def find_card(name: str, vram: float | None = None) -> Card | None:
    """The card of that name, in the spelling of people or drivers; None if there is none.

    Of several memory sizes it is the one nearest to `vram` GiB, else the most common one. If the name states a memory
    size that no such card is sold with, the result is the nearest card with that memory.
    """
    words, memory = _parse(name)
    found = _by_words().get(words) or _by_words().get(words - _FORMS) or []
    if vram is not None:
        return min(found, key=lambda card: abs(card.vram - vram), default=None)
    named = [card for card in found if _parse(card.name)[1] == memory]  # "GH200 480GB" has that beside its CPU
    if named or not found:
        return named[0] if named else None
    return replace(min(found, key=lambda card: abs(card.vram - memory)), vram=memory) if memory else found[0]


def card_like(name: str, vram: float) -> Card | None:
    """A card as fast as the named one but with `vram` GiB of memory; None if there is no card of that name."""
    card = find_card(name, vram)
    return card and replace(card, name=f"a card like {card.name},", vram=vram)


def card_rows() -> list[list[str]]:
    """A table of all cards as text, headings first."""
    rows = [[card.name, f"{card.vram:g} GB", f"{card.memory} GB/s", card.generation] for card in CARDS]
    return [["card", "VRAM", "bandwidth", "generation"], *rows]


def why_unknown(name: str) -> str:
    """Why find_card does not know a name: skyrun has no plans for such cards, or similar names are meant."""
    for pattern, kind in _OTHERS:
        if pattern.search(name.lower()):
            return f"{name!r} {_REASONS[kind]}"
    names = list(dict.fromkeys(card.name for card in CARDS))
    near = get_close_matches(name.upper(), names, 3, 0.5) or ["RTX 3060", "RTX 4070 Ti SUPER"]
    return f"{name!r} is not a card that skyrun knows, such as {', '.join(near)}"


@cache
def _by_words() -> dict[_Words, list[Card]]:
    cards = defaultdict(list)
    for card in CARDS:
        words, _ = _parse(card.name)
        cards[words].append(card)
    return cards


@cache
def _parse(name: str) -> tuple[_Words, float]:
    """The words in a name that identify the card, and the GiB that the name states, or 0.

    "NVIDIA GeForce RTX 4070 Laptop GPU" is an RTX 4070 Laptop, "4070tis 16g" an RTX 4070 Ti SUPER.
    """
    text = " ".join(name.lower().split())
    for pattern, word in _SAME:
        text = pattern.sub(word, text)
    memory = _MEMORY.search(text)
    text = _MEMORY_KIND.sub("", _MEMORY.sub(" ", text))
    words = set(_WORD.findall(text))
    if any(re.fullmatch(r"[2-5]0\d0", word) for word in words) and not words & {"pro", "quadro", "a", "ada"}:
        short = {"s": "super", "m": "laptop", "maxq": "laptop"}  # abbreviations for GeForce cards
        words = {short.get(word, word) for word in words}
    return frozenset(words - _IGNORED), float(memory[1]) if memory else 0.0
