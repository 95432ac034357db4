"""What products lose on each path, beside float64 with the same blocks: python benchmarks/product_accuracy.py

Weights and activations are those of tests/test_accuracy.py, here with more rows.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from environment import environment

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import test_accuracy as accuracy

from skyrun.kernels import QuantizedWeight, linear
from skyrun.quant import quantize

accuracy.ROWS, accuracy.OUT = 256, 256


def main() -> None:
    print(environment())
    values = accuracy.weight_values()
    print("| type | activations | weight alone | float16 | bfloat16 | int8 adds | int8 in all |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for type in accuracy.TYPES:
        weight = QuantizedWeight(quantize(values, type), type)
        decoded = weight.dense(torch.float32).double()
        for kind in accuracy.ACTIVATIONS:
            x = accuracy.activations(kind)
            source = x.double() @ values.double().T
            blocks = x.double() @ decoded.T
            fast = linear(x, replace(weight, fast=True))
            errors = [accuracy.relative(blocks, source)]
            for dtype in (torch.float16, torch.bfloat16):
                rounded = x.to(dtype)
                errors.append(accuracy.relative(linear(rounded, weight), rounded.double() @ decoded.T))
            errors += [accuracy.relative(fast, blocks), accuracy.relative(fast, source)]
            print(f"| {type} | {kind} | " + " | ".join(f"{error:.3%}" for error in errors) + " |")


if __name__ == "__main__":
    main()
