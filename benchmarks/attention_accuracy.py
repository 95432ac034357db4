"""What the precisions of attention cost: PYTHONPATH=. python benchmarks/attention_accuracy.py

Errors of the torch twins, which round as the kernels do, relative to attention in float64 with the same random tensors.
Scores spread as much as the name of a row says: "peaked" is where the largest of 512 probabilities is 0.13 on average,
"found" where every query resembles one key. The last columns have values that share a part with all others of their
channel, as large as they spread.
"""

import torch
from environment import environment
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels import torch_attention
from skyrun.kernels.quantized_keys import HEAD_DIM, PRECISIONS, QuantizedKeys

SPREAD = {"flat": 0.1, "random": 1.0, "found": 1.0, "peaked": 2.0, "3 times": 3.0, "6 times": 6.0}
HEADS, QUERIES, KEYS = 2, 256, 4096


def inputs(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(QUERIES + KEYS)
    k, v = (torch.randn(KEYS, HEADS * HEAD_DIM, generator=generator) for _ in range(2))
    q = SPREAD[kind] * torch.randn(QUERIES, HEADS * HEAD_DIM, generator=generator)
    if kind == "found":
        q += 0.6 * k[torch.randint(0, KEYS, (QUERIES,), generator=generator)]
    return q, k, v


def error(precision: str, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The relative error of a precision."""
    split = [t.double().unflatten(1, (HEADS, -1)).transpose(0, 1) for t in (q, k, v)]
    exact = F.scaled_dot_product_attention(*split).transpose(0, 1).flatten(1)
    codes, scales = torch_attention.quantize_keys(k)
    keys = QuantizedKeys(precision, codes, scales, *torch_attention.quantize_values(v, precision))
    return float((torch_attention.attend(q, keys) - exact).norm() / exact.norm())


def main() -> None:
    """Print the table."""
    quick = PRECISIONS[1:]
    print(environment())
    print("| softmax | " + " | ".join([*quick, *(f"{name}, shared part" for name in quick)]) + " |")
    print("|" + " --- |" * (1 + 2 * len(quick)))
    for kind in SPREAD:
        q, k, v = inputs(kind)
        cells = [f"{error(name, q, k, values):.2%}" for values in (v, v + 1) for name in quick]
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
