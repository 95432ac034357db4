"""Tables and pictures of what benchmarks/trained.py measures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.requests import Made

Lines = Sequence[Mapping[str, Any]]
_GROUPS = {  # what is compared with "plain", by the heading of its table
    "importance": "with importance",
    "size": "--target-size",
    "int8": "int8 linear layers",
}
_CELL, _LABEL = (64, 26), 150
_LADDER_FRAMES, _LADDER_SCALE = (4, 12), 2


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95 % confidence interval."""
    array = np.asarray(values)
    return float(array.mean()), 1.96 * float(array.std(ddof=1)) / math.sqrt(len(array))


def print_tables(lines: Lines) -> None:
    """The ladder, and each other group against what it differs from, clip by clip."""
    found = {(line["group"], line["name"]): line for line in lines}
    print("\n| type | bytes | PSNR, dB | latent error |\n| --- | --- | --- | --- |")
    for (group, name), line in found.items():
        if group in ("plain", "attention"):
            print(f"| {name}{' attention' * (group == 'attention')} | {line['bytes']} | {_text(line, 1, 4)} |")
    for group, base, title in (
        ("importance", "plain", "with importance"),
        ("int8", "plain", "int8 linear layers"),
        ("size", "plain", "--target-size"),
        ("size, importance", "importance", "--target-size, both with importance"),
    ):
        print(
            f"\n| type | {title}: PSNR, dB | latent error | gain, dB | error, ratio |\n| --- | --- | --- | --- | --- |"
        )
        for (its, name), line in found.items():
            if its == group:
                print(f"| {name} | {_text(line, 1, 4)} | {_against(line, found.get((base, name)))} |")


def _text(line: Mapping[str, Any], places: int, finer: int) -> str:
    (ratio, about), (error, near) = interval(line["psnr"]), interval(line["errors"])
    return f"{ratio:.{places}f} ± {about:.{places}f} | {error:.{finer}f} ± {near:.{finer}f}"


def _against(line: Mapping[str, Any], base: Mapping[str, Any] | None) -> str:
    """The mean gain in dB, and the geometric mean of the ratio of errors, of the same clips."""
    if base is None:
        return " | "
    gain, about = interval(np.subtract(line["psnr"], base["psnr"]))
    ratio, near = interval(np.log(np.divide(line["errors"], base["errors"])))
    return f"{gain:+.2f} ± {about:.2f} | {math.exp(ratio):.3f} ± {math.exp(ratio) * near:.3f}"


def draw_ladder(clips: Mapping[str, Sequence[Made]]) -> Image.Image:
    """A row of frames for each type, white below those that are less high than others."""
    rows, tall = [], max(clip.frames.shape[1] for made in clips.values() for clip in made)
    for made in clips.values():
        frames = [clip.frames[number] for clip in made for number in _LADDER_FRAMES]
        padding = [((0, tall - len(frame)), (0, 0), (0, 0)) for frame in frames]
        padded = [np.pad(frame, pad, constant_values=255) for frame, pad in zip(frames, padding, strict=True)]
        rows.append(np.concatenate(padded, 1))
    shown = np.concatenate(rows)
    image = Image.new("RGB", (_LABEL // 2 + _LADDER_SCALE * shown.shape[1], _LADDER_SCALE * shown.shape[0]), "white")
    enlarged = Image.fromarray(shown).resize(
        (_LADDER_SCALE * shown.shape[1], _LADDER_SCALE * shown.shape[0]), Image.Resampling.NEAREST
    )
    image.paste(enlarged, (_LABEL // 2, 0))
    draw, height = ImageDraw.Draw(image), _LADDER_SCALE * rows[0].shape[0]
    for number, quant in enumerate(clips):
        draw.text((6, (number + 0.5) * height), quant, "black", ImageFont.load_default(14), anchor="lm")
    return image


def draw_sensitivity(lines: Lines) -> Image.Image:
    """The latent error with one matrix quantized, in percent: a row per kind of matrix, a column per block."""
    errors = {line["name"]: interval(line["errors"])[0] for line in lines if line["group"] == "alone"}
    places = {name: name.removesuffix(".weight").split(".", 2)[1:] for name in errors}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    blocks, worst = 1 + max(int(block) for block, _ in places.values()), max(errors.values())
    width, height = _CELL
    image = Image.new("RGB", (_LABEL + blocks * width, (len(kinds) + 1) * height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for block in range(blocks):
        draw.text((_LABEL + (block + 0.5) * width, height / 2), f"block {block}", "#555", font, anchor="mm")
    for name, (block, kind) in places.items():
        x, y = _LABEL + int(block) * width, (1 + kinds.index(kind)) * height
        draw.text((6, y + height / 2), kind, "black", font, anchor="lm")
        light = round(255 * (1 - errors[name] / worst))
        draw.rectangle((x, y, x + width - 2, y + height - 2), (255, light, light))
        draw.text((x + width / 2, y + height / 2), f"{errors[name]:.2%}", "black", font, anchor="mm")
    return image
