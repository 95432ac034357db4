"""What importance is worth: the error of block weights without and with it, weighed by what the layers are fed.

Calibrates the tiny reference checkpoint and encodes its block matrices. Other clips than those that were used for
calibration judge the result. Its weights are random: channels of a trained model differ much more from each other.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from environment import environment

from skyrun.events import drain
from skyrun.kernels import dequantize
from skyrun.kernels.files.gguf_file import open_gguf
from skyrun.quant import convert, quantize
from skyrun.quant.choose.importance import Importance
from skyrun.tools.calibrate import collect, plan_calibration
from skyrun.tools.calibration_prompts import PROMPTS, draw_images

CHECKPOINT = Path(__file__).parent.parent / "tests" / "data" / "checkpoints" / "r2v-tiny"


def measure(model: Path, output: Path, prompts: tuple[str, ...], seed: int) -> Importance:
    """Calibrate with these prompts."""
    pictures = draw_images(output.parent)
    plan = plan_calibration(model, output, prompts, pictures, seed=seed, size="96x160", frames=9, device="cpu")
    return drain(collect(plan))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quant", nargs="+", default=["Q4_K"], metavar="TYPE")
    arguments = parser.parse_args()
    print(environment())
    with TemporaryDirectory() as folder:
        root = Path(folder)
        convert(CHECKPOINT, root / "model", "BF16")
        used = measure(root / "model", root / "used.gguf", PROMPTS[:4], seed=0)
        judge = measure(root / "model", root / "judge.gguf", PROMPTS[4:], seed=100)
        file = open_gguf(next((root / "model").glob("SkyReels*.gguf")))
        print("| type | error without | with | ratio |\n| --- | --- | --- | --- |")
        for type in arguments.quant:
            errors = {None: 0.0, "used": 0.0}
            whole = 0.0
            for name in used.sums:
                info = file.tensors[name]
                x = torch.frombuffer(file.read(info), dtype=torch.bfloat16).view(info.shape).float()
                weight = judge.mean(name)
                whole += float((weight * x**2).sum())
                for key, importance in ((None, None), ("used", used.mean(name))):
                    difference = dequantize(quantize(x, type, importance), type) - x
                    errors[key] += float((weight * difference**2).sum())
            without, with_it = ((error / whole) ** 0.5 for error in errors.values())
            print(f"| {type} | {without:.4f} | {with_it:.4f} | {with_it / without:.3f} |")


if __name__ == "__main__":
    main()
