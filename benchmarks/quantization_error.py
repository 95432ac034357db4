"""Error of a whole clip per type: python benchmarks/quantization_error.py [--image docs/frames.png]

Converts the tiny reference checkpoint to each type, makes both reference clips, and compares latents and frames with
upstream's. With --image, writes frames of upstream and of each type below each other.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from environment import environment
from PIL import Image
from safetensors.torch import load_file

from skyrun import Request, run
from skyrun.quant import convert

DATA = Path(__file__).parent.parent / "tests" / "data"
TYPES = ("F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K", "Q3_K_M", "Q2_K")
CASES = ("r2v_1img", "r2v_2img")
SHOWN, SCALE = (0, 4, 8, 12), 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path)
    arguments = parser.parse_args()
    print(environment())
    print("| type | clip | latents, relative | latents, largest | frames, mean levels | frames, largest |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows: dict[str, list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for quant in TYPES:
            model = Path(folder) / quant
            convert(DATA / "checkpoints" / "r2v-tiny", model, quant)
            for case in CASES:
                compare(quant, case, model, rows)
    if arguments.image:
        draw(rows).save(arguments.image)


def compare(quant: str, case: str, model: Path, rows: dict[str, list[np.ndarray]]) -> None:
    source = DATA / "goldens" / "e2e" / case
    config = json.loads((source / "golden.json").read_text())["config"]
    golden = load_file(source / "golden.safetensors")
    images = tuple(source / name for name in config["reference_images"])
    size, frames = (config["height"], config["width"]), config["num_frames"]
    request = Request("r2v", config["prompt"], images, model=model, size=size, frames=frames, seed=config["seed"])
    result = run(request)
    expected, theirs = golden["out.latents_after_step8"][0], golden["out.frames"].numpy()
    error = float((result.latents - expected).norm() / expected.norm())
    worst = float((result.latents - expected).abs().max())
    levels = abs(result.frames.astype(int) - theirs)
    print(f"| {quant} | {case} | {error:.1e} | {worst:.1e} | {levels.mean():.3f} | {levels.max()} |")
    rows.setdefault(f"{case} upstream", [theirs[n] for n in SHOWN])
    rows[f"{case} {quant}"] = [result.frames[n] for n in SHOWN]


def draw(rows: dict[str, list[np.ndarray]]) -> Image.Image:
    """Left the clip with one reference, right the one with two; upstream on top, then each type."""
    columns = []
    for case in CASES:
        strips = [np.concatenate(frames, 1) for name, frames in rows.items() if name.startswith(case)]
        columns.append(np.concatenate(strips, 0))
    height = max(column.shape[0] for column in columns)
    padded = [np.pad(c, ((0, height - c.shape[0]), (0, 8), (0, 0)), constant_values=255) for c in columns]
    sheet = np.concatenate(padded, 1)
    return Image.fromarray(sheet).resize((sheet.shape[1] * SCALE, sheet.shape[0] * SCALE), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
