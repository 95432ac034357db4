"""Errors on weights that nothing was tuned on: python benchmarks/unseen_weights.py --ggml LIB [--type T] [--record F]

Encodes fresh draws of weights with our encoders and with both of ggml's searches (without importance, and with ones),
and prints the mean ratio of our error to the better of theirs, with 95 % intervals over the draws. Draws are normal
weights, Student-t weights with 3 degrees of freedom, and rows of the transformer of the small model that skyrun
carries. --record keeps ggml's errors of the first draws, which tests/test_encode_unseen.py compares with.
"""

import argparse
import json
from pathlib import Path

import torch
from encoders import TYPES, Quantizer, error, ggml
from environment import environment
from safetensors.torch import load_file
from torch import Tensor

from skyrun.quant import quantize

CHECKPOINT = Path(__file__).parent.parent / "skyrun" / "demo" / "checkpoint"
CASES = ("gauss", "student", "trained")
DRAWS, RECORDED = 32, 4
SHAPE = (64, 1024)
FIRST_SEED = 1_000_000  # the clips and steps of the encoders were chosen on seeds below


def trained_rows(width: int) -> Tensor:
    """The rows of all matrices in the small model's blocks, float32 [n, width]."""
    tensors = load_file(CHECKPOINT / "transformer" / "diffusion_pytorch_model.safetensors")
    blocks = [x for name, x in tensors.items() if name.startswith("blocks.") and x.ndim == 2]
    return torch.cat([x.float().view(-1, width) for x in blocks])


def draw(case: str, number: int) -> Tensor:
    """Draw `number` of the weights of a case, float32."""
    generator = torch.Generator().manual_seed(FIRST_SEED + number)
    if case == "trained":
        rows = trained_rows(256)
        return rows[torch.randperm(len(rows), generator=generator)[: SHAPE[0] * SHAPE[1] // 256]]
    x = torch.randn(SHAPE, generator=generator)
    if case == "student":
        x *= 0.05 / torch.randn((3, *SHAPE), generator=generator).square().mean(0).sqrt()
    return x


def ggmls_error(x: Tensor, type: str, theirs: Quantizer) -> float:
    """The error of the better of ggml's two searches."""
    return min(error(x, theirs(x, type, weights), type) for weights in (None, torch.ones(x.shape[1])))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ggml", type=Path, metavar="LIB", required=True, help="libggml-base.so to compare with")
    parser.add_argument("--type", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument("--record", type=Path, metavar="F", help="write ggml's errors of the first draws to F")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    theirs = ggml(arguments.ggml)
    print(environment())
    print(f"\n| type | {' | '.join(CASES)} |\n|{' --- |' * (1 + len(CASES))}")
    recorded: dict[str, dict[str, list[float]]] = {}
    for type in arguments.type:
        cells, recorded[type] = [], {}
        for case in CASES:
            draws = [draw(case, number) for number in range(DRAWS)]
            reference = torch.tensor([ggmls_error(x, type, theirs) for x in draws])
            ratio = torch.tensor([error(x, quantize(x, type), type) for x in draws]) / reference
            cells.append(f"{ratio.mean():.4f} ± {1.96 * ratio.std() / DRAWS**0.5:.4f}")
            recorded[type][case] = reference[:RECORDED].tolist()
        print(f"| {type} | {' | '.join(cells)} |", flush=True)
    if arguments.record:
        arguments.record.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
