"""Clips of every task beside upstream's: python benchmarks/tasks.py [--sheets docs]

Converts the tiny reference checkpoints to several types, makes the reference clips, and compares latents and frames
with upstream's; for the talking avatar also the audio with the frames. With --sheets, writes an image per task:
frames of upstream in the first row, then those of each type.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
from environment import environment
from PIL import Image
from safetensors.torch import load_file

from skyrun import Request, run
from skyrun.engine.run import Result
from skyrun.media.contact_sheet import contact_sheet, places
from skyrun.media.image import write_image
from skyrun.media.speech import read_speech
from skyrun.quant import convert
from skyrun.tasks import TASKS
from skyrun.tasks.windows import SPEECH_RATE

DATA = Path(__file__).parent.parent / "tests" / "data"
TYPES = ("F32", "Q8_0", "Q4_K")
CLIPS = {"v2v": "single_shot_extension", "shot": "shot_switching_extension", "a2v": "talking_avatar"}
LATENTS = {
    "v2v": ("out.latents_after_step8_w0", "out.latents_after_step8_w1"),
    "shot": ("out.latents_after_step8",),
    "a2v": tuple(f"out.latent_final_p{index}" for index in range(4)),
}
COLUMNS, SCALE = 8, 4


def request_of(task: str, config: dict[str, Any], folder: Path, model: Path, output: Path) -> Request:
    """The clip of a golden: its windows are smaller than the real ones."""
    same: dict[str, Any] = {"size": (config["height"], config["width"]), "seed": config["seed"], "model": model}
    same |= {"output": output, "device": "cpu"}
    prompt = config["prompt"]
    if task == "a2v":
        image, audio = folder / config["image"], folder / config["audio"]
        return Request(task, prompt, (image,), audio=audio, window_frames=config["frame_num"], **same)
    same |= {"video": folder / config["input_video"], "condition_frames": config["num_condition_frames"]}
    if task == "shot":
        return Request(task, prompt, frames=config["num_frames"], **same)
    return Request(task, prompt, seconds=config["duration"], latent_rate=config["factor_num_frames"], **same)


def compare(task: str, quant: str, result: Result, golden: dict[str, Any]) -> None:
    latents = np.concatenate([golden[name].reshape(16, *golden[name].shape[-3:]).numpy() for name in LATENTS[task]], 1)
    difference = result.latents.numpy() - latents
    error = float(np.linalg.norm(difference) / np.linalg.norm(latents))
    levels = abs(result.frames.astype(int) - golden["out.frames"].numpy())
    print(
        f"| {task} | {quant} | {error:.1e} | {abs(difference).max():.1e} | {levels.mean():.3f} | {levels.max()} "
        f"| {(levels > 0).mean():.3%} |"
    )


def sync(clip: Path, speech: Path) -> None:
    """How far sound is from where it belongs, by correlation of what the clip plays with what was said."""
    with av.open(str(clip)) as container:
        frames = sum(1 for _ in container.decode(video=0))
        container.seek(0)
        heard = [(frame.time, frame.to_ndarray()[0]) for frame in container.decode(audio=0)]
    samples, start = np.concatenate([piece for _, piece in heard]), round(heard[0][0] * SPEECH_RATE)
    said = read_speech(speech, SPEECH_RATE, TASKS["a2v"].seconds).samples
    middle = slice(len(said) // 4, len(said) * 3 // 4)
    lags = range(-800, 801)
    scores = [np.dot(samples[middle.start - start + lag : middle.stop - start + lag], said[middle]) for lag in lags]
    late = lags[int(np.argmax(scores))] / SPEECH_RATE
    print(
        f"\nspeech: {len(said) / SPEECH_RATE:.2f} s, video: {frames} frames or {frames / 25:.2f} s; "
        f"sound is {1000 * late:+.2f} ms late"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheets", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    print(environment())
    print("| task | type | latents, relative | latents, largest | frames, mean levels | largest | values that differ |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        for task, case in CLIPS.items():
            folder = DATA / "goldens" / "e2e" / case
            config = json.loads((folder / "golden.json").read_text())["config"]
            golden = load_file(folder / "golden.safetensors")
            chosen = places(len(golden["out.frames"]), COLUMNS)
            rows = [golden["out.frames"].numpy()[number] for number in chosen]
            for quant in TYPES:
                model, clip = Path(place) / f"{task}-{quant}", Path(place) / f"{task}-{quant}.mp4"
                convert(DATA / "checkpoints" / config["checkpoint"], model, quant)
                result = run(request_of(task, config, folder, model, clip))
                compare(task, quant, result, golden)
                rows += [result.frames[number] for number in chosen]
            if arguments.sheets:
                sheet = contact_sheet(rows, COLUMNS)
                large = sheet.resize((sheet.width * SCALE, sheet.height * SCALE), Image.Resampling.NEAREST)
                write_image(arguments.sheets / f"{task}.png", large)
        sync(Path(place) / "a2v-F32.mp4", folder / config["audio"])


if __name__ == "__main__":
    main()
