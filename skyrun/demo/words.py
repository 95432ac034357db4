"""The words that the small model knows. Whatever a prompt shows is a topic in them."""

import re
from dataclasses import dataclass

COLOURS = {
    "red": (215, 35, 45),
    "orange": (250, 145, 20),
    "yellow": (250, 220, 60),
    "green": (35, 160, 70),
    "blue": (50, 100, 235),
    "purple": (150, 60, 190),
}
SHAPES = ("ball", "square", "triangle", "star", "face")
SCENES = {
    "white": ("on white", "on a white ground"),
    "sea": ("over the sea", "by the sea"),
    "grass": ("over the grass", "on the grass"),
    "desert": ("in the desert", "over the sand"),
    "night": ("at night", "in the night"),
}
MOTIONS = {
    "right": ("moves to the right", "goes right"),
    "left": ("moves to the left", "goes left"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "falls"),
    "bounce": ("bounces", "jumps up and down"),
    "grow": ("grows", "gets bigger"),
    "shrink": ("shrinks", "gets smaller"),
    "spin": ("spins", "turns around"),
    "still": ("stays still", "stands still"),
}
PROMPT = "A red star moves to the right over the sea."
ARTICLES = ("a", "an", "the")
PLACES = {"white": "white", "sea": "sea", "grass": "grass", "desert": "desert", "sand": "desert", "night": "night"}
_SILENT = set(ARTICLES).union(("to", "over", "by", "on", "in", "at", "and", "around", "ground", "gets"))  # alone


@dataclass(frozen=True)
class Topic:
    """What a clip shows."""

    colour: str
    shape: str
    motion: str
    scene: str


def known_words() -> list[str]:
    """Every word that a phrasing of the small model's world has, sorted."""
    phrases = [*COLOURS, *SHAPES, *(phrase for group in (*MOTIONS.values(), *SCENES.values()) for phrase in group)]
    return sorted({word for phrase in phrases for word in phrase.split()} | set(ARTICLES))


def known_in(prompt: str) -> list[str]:
    """The words of the prompt that the model knows and that say something, in their order."""
    known = set(known_words()) - _SILENT
    return [word for word in re.findall("[a-z]+", prompt.lower()) if word in known]


def pictured(prompt: str) -> tuple[str, str, str]:
    """Colour, shape and scene that the prompt names; what it leaves open is red, a ball, and white."""
    words = known_in(prompt)
    colour = next((word for word in words if word in COLOURS), "red")
    shape = next((word for word in words if word in SHAPES), "ball")
    return colour, shape, next((PLACES[word] for word in words if word in PLACES), "white")


def words_text() -> str:
    """The words by what they stand for, in one sentence."""
    motions = ", ".join(phrases[0] for phrases in MOTIONS.values())
    places = ", ".join(phrases[0] for phrases in SCENES.values())
    return f"It knows {', '.join(COLOURS)}; {', '.join(SHAPES)}; {motions}; {places}."
