"""Many clips in one process: do memory, open files or threads grow?

A model as small as the architecture allows makes a short clip each time, mp4 included, with a prompt and a seed of its
own. Prints resident memory, open files and threads on the way, and how much each grows per run, as the slope of a line
through the second half of the runs: the first fill pools of the C library and of torch.
"""

import argparse
import gc
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from environment import environment
from PIL import Image

from skyrun import Request, run
from skyrun.demo.world import sprite_picture
from skyrun.quant import convert
from skyrun.tools.tiny_checkpoint import CheckpointDims, write_checkpoint

_SMALLEST = CheckpointDims(dim=128, layers=2, ffn=256, text=64, text_layers=1, vae_base=4)


@dataclass(frozen=True)
class Sample:
    """What the process has after a run."""

    resident_bytes: int
    files: int
    threads: int


def sample() -> Sample:
    """What it has now."""
    gc.collect()
    process = psutil.Process()
    files = process.num_handles() if os.name == "nt" else process.num_fds()
    return Sample(process.memory_info().rss, files, threading.active_count())


def slope(values: list[int]) -> float:
    """Growth per run over the second half."""
    half = values[len(values) // 2 :]
    return float(np.polyfit(np.arange(len(half)), half, 1)[0])


def main() -> None:
    """Print samples and slopes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200, metavar="N")
    arguments = parser.parse_args()
    print(environment())
    samples: list[Sample] = []
    with TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["SKYRUN_CACHE"] = str(folder / "cache")
        write_checkpoint(folder / "checkpoint", _SMALLEST)
        convert(folder / "checkpoint", folder / "model", "Q8_0")
        picture = np.uint8(255 * sprite_picture("face", (0.9, 0.8, 0.2), (96, 128)))
        Image.fromarray(picture).save(folder / "picture.png")
        picture, model = (folder / "picture.png",), folder / "model"
        for index in range(arguments.runs):
            output = folder / f"{index}.mp4"
            run(Request("r2v", f"clip {index}", picture, output, model, size=(64, 96), frames=9, steps=2, seed=index))
            samples.append(sample())
            output.unlink()
            if (index + 1) % max(1, arguments.runs // 10) == 0:
                now = samples[-1]
                print(f"{index + 1} runs: {now.resident_bytes / 1e6:.1f} MB, {now.files} files, {now.threads} threads")
    print(f"growth per run: {slope([one.resident_bytes for one in samples]) / 1e3:.1f} kB resident, ", end="")
    print(f"{slope([one.files for one in samples]):.3f} files, {slope([one.threads for one in samples]):.3f} threads")


if __name__ == "__main__":
    main()
