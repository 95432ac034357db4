"""The results of an acceptance run as tables for the documentation."""

from collections.abc import Iterator, Sequence
from typing import Any

from acceptance.steps import STEPS

Line = dict[str, Any]
_WORDS = {True: "pass", False: "FAIL", None: "-"}


def report(lines: Sequence[Line]) -> str:
    """What passed, then the figures by the page that they belong to."""
    parts = [_environment(lines), *_overview(lines)]
    for page in sorted({step.page for step in STEPS}):
        parts += ["", f"## For docs/{page}"]
        for line in lines:
            step = next((step for step in STEPS if step.name == line["name"]), None)
            if step is not None and step.page == page and line["figures"]:
                parts += ["", *_figures(line, step.about)]
    return "\n".join(parts)


def _environment(lines: Sequence[Line]) -> str:
    found = next((line["environment"] for line in lines if "environment" in line), {})
    return "`python benchmarks/on_a_card.py`, " + ", ".join(f"{name} {value}" for name, value in found.items())


def _overview(lines: Sequence[Line]) -> Iterator[str]:
    yield from ("", "| step | | seconds | result | what is wrong |", "| --- | --- | --- | --- | --- |")
    for line in sorted(lines, key=lambda line: line["step"]):
        wrong = [figure["name"] for figure in line["figures"] if figure["passed"] is False]
        said = line.get("error") or line.get("skipped") or "; ".join(wrong)
        result = "skipped" if "skipped" in line else _WORDS[line["passed"]]
        cells = [line["step"], line["name"], line["seconds"], result, said]
        yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _figures(line: Line, about: str) -> Iterator[str]:
    yield f"**{line['name']}**: {about}"
    yield from ("", "| | figure | bound | result |", "| --- | --- | --- | --- |")
    for figure in line["figures"]:
        value = f"{_cell(figure['value'])} {figure.get('unit', '')}".strip()
        bounds = [f"{sign} {figure[name]:.4g}" for name, sign in (("least", ">="), ("most", "<=")) if name in figure]
        yield f"| {_cell(figure['name'])} | {value} | {', '.join(bounds)} | {_WORDS[figure['passed']]} |"


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "/").split())
