"""Clips of text and image to video beside diffusers': python benchmarks/wan.py [--sheets docs]

Writes tiny checkpoints of Wan 2.1 and SkyReels-V2 (random weights, the real layout), converts them to several types,
makes the same clips with diffusers and with skyrun, and compares latents and frames. With --sheets, writes an image per
task: diffusers' frames in the first row, then those of each type.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from environment import environment
from PIL import Image

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from wan_checkpoint import reference_frames, reference_latents, write_wan

from skyrun import Request, run
from skyrun.demo.world import scene_picture
from skyrun.media.contact_sheet import contact_sheet, places
from skyrun.media.image import write_image
from skyrun.quant import convert

TYPES = ("F32", "Q8_0", "Q4_K")
MODELS = {
    "t2v": ("Wan2.1-T2V-1.3B", "SkyReels-V2-T2V-14B-540P"),
    "i2v": ("Wan2.1-I2V-14B-480P", "SkyReels-V2-I2V-14B-540P"),
}
SIZE, FRAMES, STEPS, COLUMNS, SCALE = (64, 96), 29, 8, 8, 2
PROMPT, NEGATIVE = "a man walking in the city, looking at the camera", "a blue sea"


def picture(folder: Path) -> Path:
    """A drawn scene of twice the clip's size."""
    scene = scene_picture("sea", (2 * SIZE[0], 2 * SIZE[1]), np.random.default_rng(0))
    Image.fromarray((255 * scene).astype(np.uint8)).save(folder / "scene.png")
    return folder / "scene.png"


def request_of(task: str, folder: Path, model: Path) -> Request:
    values = {"size": SIZE, "frames": FRAMES, "steps": STEPS, "seed": 3, "device": "cpu", "negative_prompt": NEGATIVE}
    images = (folder / "scene.png",) if task == "i2v" else ()
    return Request(task, PROMPT, images, model=model, guidance=5.0, shift=5.0, **values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheets", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    print(environment())
    print("| model | type | latents, relative | latents, largest | frames, mean levels | largest |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        picture(Path(place))
        for task, models in MODELS.items():
            for title in models:
                source, family = Path(place) / title, "Wan2.1" if title.startswith("Wan") else "SkyReels-V2"
                parts = write_wan(source, family, task == "i2v")
                expected = reference_latents(family, parts, request_of(task, Path(place), source))
                levels = reference_frames(parts["vae"], expected)
                chosen = places(len(levels), COLUMNS)
                rows = [levels[number].astype(np.uint8) for number in chosen]
                for quant in TYPES:
                    model = Path(place) / f"{title}-{quant}"
                    convert(source, model, quant)
                    made = run(request_of(task, Path(place), model))
                    difference = (made.latents - expected).numpy()
                    error = float(np.linalg.norm(difference) / np.linalg.norm(expected.numpy()))
                    off = abs(made.frames - np.trunc(levels))
                    print(
                        f"| {title} | {quant} | {error:.1e} | {abs(difference).max():.1e} | {off.mean():.3f} "
                        f"| {off.max():.0f} |",
                        flush=True,
                    )
                    rows += [made.frames[number] for number in chosen]
            if arguments.sheets:
                sheet = contact_sheet(rows, COLUMNS)
                large = sheet.resize((sheet.width * SCALE, sheet.height * SCALE), Image.Resampling.NEAREST)
                write_image(arguments.sheets / f"{task}.png", large)


if __name__ == "__main__":
    main()
