"""`skyrun info`: describe a file, and compare it with its source."""

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from skyrun.cli.console import display, emit
from skyrun.hub.local import model_path
from skyrun.tools.inspect import describe, described_file
from skyrun.units import size, table

if TYPE_CHECKING:
    from skyrun.quant.compare import TensorError

_LONG = 2000  # characters; a prompt is shorter, a tokenizer longer


def execute(arguments: Namespace) -> int:
    """Describe a file, and compare it with its source."""
    arguments.file = described_file(model_path(arguments.file))
    description = describe(arguments.file)
    text = description_text(description)
    if arguments.against:
        from skyrun.cli.progress import shown
        from skyrun.tools.convert import compare

        errors = shown(compare(arguments.file, arguments.against), False)
        description["errors"] = [error.as_json() for error in errors]
        text = f"{text}\nerror against {arguments.against}:\n{errors_text(errors)}"
    if arguments.json:
        emit(description)
    else:
        display(text)
    return 0


def description_text(description: dict[str, Any]) -> str:
    """The text of a description, without the errors of tensors."""
    lines = [f"{description['path']}: {description['kind']}, {size(description['bytes'])}"]
    for title, values in description.items():
        if isinstance(values, dict) and values:
            lines.append(f"{title.replace('_', ' ')}:")
            lines += [f"  {_line(name)}: {_shown(value)}" for name, value in values.items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{part} {name}" if isinstance(part, int) else f"{name} {part}" for name, part in value.items()
        )
    text = _line(str(value))
    return text if len(text) <= _LONG else f"{text[:80]}... ({len(text)} characters)"


def _line(text: str) -> str:
    """Quote a text that would not stay on its line."""
    return text if text.isprintable() else json.dumps(text)


def errors_text(errors: "Sequence[TensorError]") -> str:
    """The errors of all tensors that are not exact, largest first."""
    worst = sorted((error for error in errors if error.error), key=lambda error: -error.error)
    same = len(errors) - len(worst)
    rows = [("tensor", "type", "error", "largest")]
    rows += [(error.name, error.type, f"{error.error:.3%}", f"{error.largest:.3g}") for error in worst]
    lines = [table(rows)] if worst else []
    if worst:
        weights = sum(error.weights for error in worst)
        total = (sum(error.weights * error.error**2 for error in worst) / weights) ** 0.5
        lines.append(f"{total:.3%} over all of these, each counting by its weights")
    return "\n".join([*lines, f"{same} of {len(errors)} tensors are exactly the source's"])
