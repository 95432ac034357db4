"""Draw the errors per tensor and block as an interactive HTML page or a PNG image that lists the worst tensors."""

import html
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.atomic import replacing
from skyrun.quant.compare import TensorError

_IN_BLOCK = re.compile(r"(?:blocks|enc\.blk|v\.blk)\.(\d+)\.(.+)\.weight")
_WORST = 12
# Colors from the least error to the most (viridis, which color-blind people can read).
_SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_CELL, _MARGIN, _LINE = 22, 24, 18

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ErrorMap:
    """Errors of the matrices in blocks, by kind and block, and the range of errors that the colors cover."""

    title: str
    blocks: int
    kinds: dict[str, dict[int, TensorError]]
    low: float
    high: float
    worst: tuple[TensorError, ...]

    def colour(self, error: float) -> Colour:
        """The color of an error, on a logarithmic scale: neighbouring types differ by about a factor of two."""
        if error <= 0 or self.high <= self.low:
            return _SCALE[0]
        place = math.log(error / self.low) / math.log(self.high / self.low) * (len(_SCALE) - 1)
        index = min(int(max(place, 0.0)), len(_SCALE) - 2)
        share = min(max(place - index, 0.0), 1.0)
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(_SCALE[index], _SCALE[index + 1], strict=True))
        return red, green, blue


def error_map(title: str, errors: Sequence[TensorError]) -> ErrorMap:
    """Arrange the errors of a file by kind and block."""
    kinds: dict[str, dict[int, TensorError]] = {}
    for error in errors:
        if match := _IN_BLOCK.fullmatch(error.name):
            kinds.setdefault(match[2], {})[int(match[1])] = error
    matrices = {kind: row for kind, row in kinds.items() if any(error.error for error in row.values())}
    positive = [error.error for row in matrices.values() for error in row.values() if error.error > 0]
    blocks = 1 + max((block for row in matrices.values() for block in row), default=-1)
    worst = tuple(sorted((e for e in errors if e.error > 0), key=lambda error: -error.error)[:_WORST])
    return ErrorMap(title, blocks, matrices, min(positive, default=0.0), max(positive, default=0.0), worst)


def write_error_map(path: Path, shown: ErrorMap) -> None:
    """Write the image in the format of the path's suffix, .html or .png."""
    write = {".html": _write_html, ".png": _write_png}[check_suffix(path)]
    with replacing(path) as partial:
        write(partial, shown)


def check_suffix(path: Path) -> str:
    """The suffix of a report's path. Raises SkyrunError if reports cannot be written in that format."""
    suffix = path.suffix.lower()
    if suffix not in (".html", ".png"):
        raise SkyrunError(f"a report cannot be written as {path.name}", "name it .html or .png")
    return suffix


def _types(row: dict[int, TensorError]) -> str:
    return ", ".join(type for type, _ in Counter(error.type for error in row.values()).most_common())


def _percent(error: float) -> str:
    return f"{error:.3%}" if error < 0.01 else f"{error:.2%}"


def _write_html(path: Path, shown: ErrorMap) -> None:
    heads = "".join(f"<th>{block}</th>" for block in range(shown.blocks))
    rows = "".join(_html_row(kind, row, shown) for kind, row in shown.kinds.items())
    worst = "".join(
        f"<tr><td>{html.escape(e.name)}</td><td>{e.type}</td><td>{_percent(e.error)}</td></tr>" for e in shown.worst
    )
    stops = ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in _SCALE)
    path.write_text(
        f"""<!doctype html>
<meta charset="utf-8"><title>{html.escape(shown.title)}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}
table {{ border-collapse: separate; border-spacing: 1px; margin: 1em 0 }}
th, td {{ font-weight: normal; text-align: left; padding: 1px 6px; white-space: nowrap }}
th {{ color: #777; font-size: 11px; text-align: center; padding: 0 }}
.map td.cell {{ min-width: 16px; height: 18px; padding: 0 }}
.scale {{ width: 300px; height: 12px; background: linear-gradient(to right, {stops}) }}
</style>
<h1>{html.escape(shown.title)}</h1>
<p>Error of each matrix's output relative to it (root mean square), by kind and block. Hover for numbers.</p>
<div class="scale"></div><p>{_percent(shown.low)} to {_percent(shown.high)}, logarithmic</p>
<table class="map"><tr><th></th>{heads}<th></th></tr>{rows}</table>
<h2>The worst {len(shown.worst)}</h2><table>{worst}</table>
""",
        encoding="utf-8",
    )


def _html_row(kind: str, row: dict[int, TensorError], shown: ErrorMap) -> str:
    cells = []
    for block in range(shown.blocks):
        if block not in row:
            cells.append("<td></td>")
            continue
        red, green, blue = shown.colour(row[block].error)
        hover = html.escape(f"{row[block].name}, {row[block].type}: {_percent(row[block].error)}")
        cells.append(f'<td class="cell" style="background:rgb({red},{green},{blue})" title="{hover}"></td>')
    return f"<tr><td>{html.escape(kind)}</td>{''.join(cells)}<td>{_types(row)}</td></tr>"


def _write_png(path: Path, shown: ErrorMap) -> None:
    small, large = ImageFont.load_default(12), ImageFont.load_default(17)
    left = _MARGIN + max((int(small.getlength(kind)) for kind in shown.kinds), default=0) + 12
    right = left + shown.blocks * _CELL
    top = _MARGIN + 4 * _LINE
    bottom = top + len(shown.kinds) * _CELL
    labels = max((int(small.getlength(_types(row))) for row in shown.kinds.values()), default=0)
    width = max(right + 12 + labels, 520) + _MARGIN
    image = Image.new("RGB", (width, bottom + (len(shown.worst) + 6) * _LINE), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), shown.title, "black", large)
    about = "error of each matrix's output relative to it (root mean square), by kind and block"
    draw.text((_MARGIN, _MARGIN + 24), about, "#555", small)
    draw.text((_MARGIN, top - _LINE), "block", "#555", small)
    for block in range(0, shown.blocks, 1 if shown.blocks <= 10 else 5):
        draw.text((left + block * _CELL + 4, top - _LINE), str(block), "#555", small)
    for place, (kind, row) in enumerate(shown.kinds.items()):
        y = top + place * _CELL
        draw.text((_MARGIN, y + 3), kind, "black", small)
        draw.text((right + 12, y + 3), _types(row), "#555", small)
        for block, error in row.items():
            x = left + block * _CELL
            draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), shown.colour(error.error))
    _draw_scale(draw, (left, bottom + _LINE // 2), shown, small)
    draw.text((_MARGIN, bottom + 3 * _LINE), f"the worst {len(shown.worst)}", "black", small)
    for place, error in enumerate(shown.worst):
        y = bottom + (4 + place) * _LINE
        draw.text((_MARGIN, y), _percent(error.error), "black", small)
        draw.text((_MARGIN + 70, y), error.type, "black", small)
        draw.text((_MARGIN + 130, y), error.name, "black", small)
    image.save(path, "PNG")


def _draw_scale(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], shown: ErrorMap, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> None:
    x, y = at
    for step in range(200):
        error = shown.low * (shown.high / shown.low) ** (step / 199) if shown.low else 0.0
        draw.line((x + step, y, x + step, y + 10), shown.colour(error))
    draw.text((x + 208, y - 2), f"{_percent(shown.low)} to {_percent(shown.high)}, logarithmic", "#555", font)
