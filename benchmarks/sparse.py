"""What attention skips on the trained small model, and what that costs: PYTHONPATH=. python benchmarks/sparse.py

Makes clips with bounds of 0.3, 1 and 3 percent. Beside every attention that skips, the dense one is computed from the
same queries and keys: the true error of each block, head and step, all of which the run itself only samples. Prints
tables for docs/attention.md; --tiles and --steps draw its pictures.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from environment import environment
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from skyrun.hub.built_in import CHECKPOINT
from skyrun.kernels import selection
from skyrun.kernels.attention import attend
from skyrun.kernels.selection import TiledKeys
from skyrun.kernels.tiles import Selection, Tiles
from skyrun.models.dit.sparse import BlockCheck, SelfCheck, shares_at
from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import stated
from skyrun.quant import convert
from training.requests import Made, drawn_request, make, psnr

BOUNDS = (0.3, 1.0, 3.0)  # percent
CARDS = ("RTX 3060", "RTX 4060", "RTX 3090", "RTX 4090", "RTX 5070 Ti", "RTX 5090")
_CELL, _LABEL = (64, 26), 110


@dataclass
class Seen:
    """What one bound did. true: relative errors of heads, float32 [heads] each. densities, errors: of each block, by
    step. lists: the selections of the last clip, by (step, block), with the rows of their queries."""

    true: list[Tensor] = field(default_factory=list)
    steps: list[tuple[int, float, float, tuple[float, ...], tuple[float, ...]]] = field(default_factory=list)
    lists: dict[tuple[int, int], tuple[slice, Selection]] = field(default_factory=dict)
    order: Any = None


@contextmanager
def watching(seen: Seen) -> Iterator[None]:
    """Compute the dense attention beside each sparse one, and keep the events of steps."""
    usual, finish = BlockCheck.attend, SelfCheck.finish_step

    def watched(self: BlockCheck, q: Tensor, keys: TiledKeys, rows: slice) -> Tensor:
        out, check = usual(self, q, keys, rows), self._check
        if not check.learns:
            dense = attend(q, keys.keys).unflatten(1, (keys.heads, -1))
            off = out.unflatten(1, (keys.heads, -1)) - dense
            seen.true.append((off.square().sum((0, 2)) / dense.square().sum((0, 2))).sqrt())
            starts = list(range(rows.start, rows.stop, keys.tiles.queries))
            seen.lists[check.step, self._place[1]] = rows, keys.choose(q, starts, shares_at(self._levels, q))
            seen.order = check.order
        return out

    def finished(self: SelfCheck) -> Any:
        step, learns = self.step, self.learns
        learned, events = finish(self)
        if not learns:
            (event,) = events
            dense = event.dense_heads / event.heads
            seen.steps.append((step, event.density, dense, event.densities, event.errors))
        return learned, events

    with patch.object(BlockCheck, "attend", watched), patch.object(SelfCheck, "finish_step", finished):
        yield


def measured(model: Path, clips: list[tuple[Request, Made]], bound: float, attention: str) -> tuple[Seen, list[float]]:
    """What a bound did, and the PSNR of each clip against the dense one."""
    seen, ratios = Seen(), []
    with watching(seen):
        for request, wanted in clips:
            made = make(replace(request, model=model, attention=f"{attention},sparse:{bound:g}"))
            ratios.append(psnr(made.frames, wanted.frames))
    return seen, ratios


def print_bounds(found: dict[float, tuple[Seen, list[float]]]) -> None:
    """The table of bounds."""
    print("| bound | density | dense heads | error: median | 95 % | largest | within the bound | PSNR to dense, dB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for bound, (seen, ratios) in found.items():
        true = 100 * torch.cat(seen.true)
        density, dense = (np.mean([row[n] for row in seen.steps]) for n in (1, 2))
        errors = " | ".join(f"{value:.2f} %" for value in (true.median(), true.quantile(0.95), true.max()))
        under = float((true <= bound).float().mean())
        quality = f"{np.mean(ratios):.1f}, at least {min(ratios):.1f}"
        print(f"| {bound:g} % | {density:.3f} | {dense:.0%} | {errors} | {under:.1%} | {quality} |")


def print_cards() -> None:
    """Predicted times of a clip, dense and sparse."""
    print("\n| card | attention | dense: a step, in all | density 0.5 | density 0.3 |\n| --- | --- | --- | --- | --- |")
    for name in CARDS:
        card = find_card(name)
        assert card is not None
        request, cells = Request("r2v", "", resolution="720P", seconds=4), []
        for density in (None, 0.5, 0.3):
            asked = plan_request(request, stated(card, 32, 1.0)).plan.attention
            with patch("skyrun.presets.options.USUAL_DENSITY", density or 1.0):
                how = asked if density is None else f"{asked},sparse"
                plan = plan_request(replace(request, attention=how), stated(card, 32, 1.0)).plan
            cells.append(f"{plan.step_seconds:.0f} s, {plan.seconds / 60:.1f} min")
        print(f"| {name} | {asked} | {' | '.join(cells)} |")


def draw_steps(seen: Seen) -> Image.Image:
    """Density and largest error of each block and step, means over clips."""
    steps = sorted({row[0] for row in seen.steps})
    blocks = len(seen.steps[0][3])
    width, height = _CELL
    tall = (len(steps) + 2) * height
    image = Image.new("RGB", (_LABEL + blocks * width, 2 * tall), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for part, (title, column, color) in enumerate((("density", 3, "blue"), ("error", 4, "red"))):
        draw.text((6, part * tall + height / 2), title, "black", font, anchor="lm")
        values = {
            step: np.mean([row[column] for row in seen.steps if row[0] == step], 0)  # type: ignore[arg-type]
            for step in steps
        }
        most = max(float(row.max()) for row in values.values()) or 1.0
        for block in range(blocks):
            x = _LABEL + (block + 0.5) * width
            draw.text((x, part * tall + height / 2), f"block {block}", "#555", font, anchor="mm")
        for number, step in enumerate(steps):
            y = part * tall + (number + 1) * height
            draw.text((6, y + height / 2), f"step {step + 1}", "black", font, anchor="lm")
            for block in range(blocks):
                value, x = float(values[step][block]), _LABEL + block * width
                light = round(255 * (1 - 0.6 * value / most))
                fill = (light, light, 255) if color == "blue" else (255, light, light)
                draw.rectangle((x, y, x + width - 2, y + height - 2), fill)
                text = f"{value:.2f}" if column == 3 else f"{value:.2%}"
                draw.text((x + width / 2, y + height / 2), text, "black", font, anchor="mm")
    return image


def draw_tiles(seen: Seen, clip_frames: int) -> Image.Image:
    """The tokens that a tile of queries of the clip reads, frame by frame: of the head and tile that read least."""
    counted = [
        (int(chosen.counts[head, tile]), key, head, tile)
        for key, (_, chosen) in seen.lists.items()
        for head in range(chosen.counts.shape[0])
        for tile in range(1, clip_frames * seen.order.tokens // chosen.tiles.queries)
    ]
    _, key, head, tile = min(counted)
    (rows, chosen), order = seen.lists[key], seen.order
    tiles = chosen.tiles
    colors = np.full((len(order.index), 3), 225, np.uint8)
    read = chosen.lists[head, tile, : chosen.counts[head, tile]].tolist()
    places = [n * tiles.keys + m for n in read for m in range(tiles.keys)]
    places += range(chosen.keys // tiles.keys * tiles.keys, chosen.keys)
    colors[order.index[places].numpy()] = (80, 130, 220)
    for start, stop in order.always:
        colors[order.index[start:stop].numpy()] = (170, 195, 235)
    own = slice(rows.start + tile * tiles.queries, rows.start + (tile + 1) * tiles.queries)
    colors[order.index[own].numpy()] = (220, 70, 60)
    side = round(order.tokens**0.5)
    frames = colors.reshape(-1, side, side, 3).repeat(24, 1).repeat(24, 2)
    image = Image.new("RGB", (len(frames) * (24 * side + 10) + 10, 24 * side + 40), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for number, frame in enumerate(frames):
        x = 10 + number * (24 * side + 10)
        image.paste(Image.fromarray(frame), (x, 10))
        name = f"frame {number}" if number < clip_frames else f"reference {number - clip_frames + 1}"
        draw.text((x, 24 * side + 16), name, "black", font)
    print(f"the picture: step {key[0] + 1}, block {key[1]}, head {head}, tile {tile} of {chosen.counts.shape[1]}")
    return image


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--attention", default="exact", help="the precision (%(default)s)")
    parser.add_argument("--tile", type=int, nargs=2, metavar=("QUERIES", "KEYS"), help="the sizes of tiles")
    parser.add_argument("--tiles", type=Path, metavar="PNG", help="draw what a tile of queries reads")
    parser.add_argument("--steps", type=Path, metavar="PNG", help="draw density and error by block and step")
    arguments = parser.parse_args()
    small = Tiles(*arguments.tile) if arguments.tile else selection.SMALL
    with TemporaryDirectory() as name, patch.object(selection, "SMALL", small):
        folder = Path(name)
        convert(CHECKPOINT, folder / "F32", "F32")
        requests = [drawn_request(number, "sparse", folder)[1] for number in range(arguments.clips)]
        dense = [(r, make(replace(r, model=folder / "F32", attention=arguments.attention))) for r in requests]
        found = {bound: measured(folder / "F32", dense, bound, arguments.attention) for bound in BOUNDS}
    print(f"{environment()}, {arguments.clips} clips, tiles of {small.queries} queries and {small.keys} keys\n")
    print_bounds(found)
    print_cards()
    if arguments.tiles:
        draw_tiles(found[3.0][0], dense[0][1].latents.shape[1]).save(arguments.tiles)
    if arguments.steps:
        draw_steps(found[1.0][0]).save(arguments.steps)


if __name__ == "__main__":
    main()
