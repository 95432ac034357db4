"""Error and speed of the encoders beside ggml's: python benchmarks/encoders.py [--ggml libggml-base.so] [--type Q4_K]

Errors: on the reference inputs, relative to the better of ggml's two searches (without importance, and with ones), and
weighted by the reference importance, relative to ggml's result for it. Speed: on one thread, in seconds of that thread,
best of several. With a build of ggml at hand it is timed in turn with ours, and fills in the weighted errors that the
reference data does not have; without it, speeds stand alone.
"""

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from environment import environment
from safetensors.torch import load_file
from torch import Tensor

from skyrun.kernels import FORMATS, dequantize
from skyrun.quant import quantize
from skyrun.quant.encoders.encode import ENCODERS

GOLDENS = Path(__file__).parent.parent / "tests" / "data" / "goldens" / "quant"
TYPES = [name for name in ENCODERS if FORMATS[name].block_size > 1]
CASES = ("gauss", "student", "dit")
ROWS, COLS, TURNS = 512, 5120, 5

Quantizer = Callable[[Tensor, str, Tensor | None], Tensor]


def ggml(library: Path) -> Quantizer:
    """ggml's own quantizer, from its shared library."""
    function = ctypes.CDLL(str(library), mode=os.RTLD_LAZY).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def run(x: Tensor, type: str, importance: Tensor | None) -> Tensor:
        out = torch.empty(len(x), FORMATS[type].row_bytes(x.shape[1]), dtype=torch.uint8)
        weights = None if importance is None else importance.data_ptr()
        function(FORMATS[type].id, x.data_ptr(), out.data_ptr(), 0, len(x), x.shape[1], weights)
        return out

    return run


def error(x: Tensor, blocks: Tensor, type: str, weight: Tensor | None = None) -> float:
    weight = torch.ones(()) if weight is None else weight
    noise = (weight * (x - dequantize(blocks, type)).square()).sum()
    return float((noise / (weight * x.square()).sum()).sqrt())


def error_table(types: list[str], theirs: Quantizer | None) -> None:
    inputs = load_file(GOLDENS / "inputs.safetensors")
    quick = json.loads((GOLDENS / "manifest.json").read_text())["types"]
    thorough = json.loads((GOLDENS / "ones.json").read_text())["rel_rmse_ones"]
    print("\n| type | case | ours | ggml | ratio | weighted: ours | ggml | ratio |\n|" + " --- |" * 8)
    for type in types:
        stored = load_file(GOLDENS / f"{type}.safetensors")
        for case in CASES:
            x = inputs[case]
            best = min(quick[type]["rel_rmse"][case], thorough.get(type, {}).get(case, np.inf))
            ours = error(x, quantize(x, type), type)
            weight = inputs["dit_imatrix"][: x.shape[1]].contiguous()
            weighted = error(x, quantize(x, type, weight), type, weight)
            blocks = stored["dit_imat.bytes"] if case == "dit" else theirs(x, type, weight) if theirs else None
            beside = "| - | - |"
            if blocks is not None:
                reference = error(x, blocks, type, weight)
                beside = f"| {reference:.4f} | {weighted / reference:.3f} |"
            print(f"| {type} | {case} | {ours:.4f} | {best:.4f} | {ours / best:.3f} | {weighted:.4f} {beside}")


def speed(quantizer: Quantizer, x: Tensor, type: str, importance: Tensor | None) -> float:
    """Million weights a second of this thread."""
    times = []
    for _ in range(TURNS):
        start = time.thread_time()
        quantizer(x, type, importance)
        times.append(time.thread_time() - start)
    return x.numel() / min(times) / 1e6


def speed_table(types: list[str], theirs: Quantizer | None) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLS, generator=generator).bfloat16().float()
    importance = torch.randn(COLS, generator=generator).exp()
    print(
        "\n| type | Mweights/s | ggml quick | ratio | ggml thorough | ratio | with importance | ggml | ratio |\n|"
        + " --- |" * 9
    )
    for type in types:
        ours, weighted = (speed(quantize, x, type, weight) for weight in (None, importance))
        cells = [f"{ours:.1f}"]
        for mine, weight in ((ours, None), (ours, torch.ones(COLS)), (weighted, importance)):
            if mine is weighted:
                cells.append(f"{weighted:.1f}")
            reference = speed(theirs, x[:128], type, weight) if theirs else None
            cells += [f"{reference:.1f}", f"{mine / reference:.2f}"] if reference else ["-", "-"]
        print(f"| {type} | {' | '.join(cells)} |", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ggml", type=Path, metavar="LIB", help="libggml-base.so to compare with")
    parser.add_argument("--type", nargs="+", default=TYPES, choices=TYPES)
    arguments = parser.parse_args()
    theirs = ggml(arguments.ggml) if arguments.ggml else None
    print(environment())
    error_table(arguments.type, theirs)
    speed_table(arguments.type, theirs)


if __name__ == "__main__":
    main()
