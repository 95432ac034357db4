"""docs/cli.md from the parser: python -m skyrun.cli.reference > docs/cli.md"""

import argparse

from skyrun.cli.parser import parser

_HEAD = """# The command line

Written by `python -m skyrun.cli.reference`; a test checks that it is current. Text for people goes to stderr, values
go to stdout; `--json` prints one object per line. Exit codes: 0 done, 1 failed, 2 wrong usage or bad input, 3 will not
fit, 4 a model is missing or the hub cannot be reached, 130 interrupted.
"""


def reference() -> str:
    """Every command with its usage and its options, as Markdown."""
    return "\n".join([_HEAD, *(_section(command) for command in _commands(parser()))])


def _commands(of: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """All commands of a parser that have no subcommands."""
    parts = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    if not parts:
        return [of]
    return [command for action in parts for below in action.choices.values() for command in _commands(below)]


def _section(command: argparse.ArgumentParser) -> str:
    rows = [_row(action) for group in command._action_groups for action in group._group_actions]
    lines = [f"## {command.prog}", "", f"{_sentence(command.description or '')}", "", "| option | what it does |"]
    end = [command.epilog, ""] if command.epilog else []
    return "\n".join([*lines, "| --- | --- |", *(row for row in rows if row), "", *end])


def _row(action: argparse.Action) -> str:
    if isinstance(action, argparse._HelpAction):
        return ""
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    value = str(value) if action.nargs != 0 else ""
    if action.nargs == "+":
        value = f"{value} [{value} ...]"
    names = " ".join(part for part in (", ".join(action.option_strings), value) if part)
    cells = [cell.replace("|", "\\|") for cell in (f"`{names}`", (action.help or "").replace("%%", "%"))]
    return f"| {' | '.join(cells)} |"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." * (not text.endswith("."))


if __name__ == "__main__":
    print(reference(), end="")
