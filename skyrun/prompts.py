"""Prompts from files and from whoever writes them to stdin."""

import sys
from pathlib import Path

from skyrun.errors import MODEL_MISSING, SkyrunError


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line of a text file; empty lines do not count."""
    hint = "give a text file in UTF-8 with one prompt per line"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise SkyrunError(f"{path} does not exist", hint, MODEL_MISSING) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SkyrunError(f"{path} is no list of prompts: {error}", hint) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise SkyrunError(f"{path} has no prompt in it", hint)
    return prompts


def prompt_or_stdin(prompt: str) -> str:
    """The prompt, or for "-" all of stdin."""
    if prompt != "-":
        return prompt
    text = sys.stdin.read().strip()
    if not text:
        raise SkyrunError("stdin has no prompt in it", "write one, or say it with -p")
    return text
