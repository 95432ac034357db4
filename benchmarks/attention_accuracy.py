"""What the precisions of attention cost: PYTHONPATH=. python benchmarks/attention_accuracy.py

Errors of the torch twins, which round as the kernels do, relative to attention in float64 with the same random tensors.
Scores spread as much as the name of a row says: "peaked" is where the largest of 512 probabilities is 0.13 on average,
"found" where every query resembles one key. In the last columns of the first table values share a part with all others
of their channel, as large as they spread. The second table has the errors of the parts: only the scores in int8, only
the probabilities in 8 bits, only the values.
"""

import math
from collections.abc import Callable, Iterator

import torch
from environment import environment
from torch import Tensor
from torch.nn import functional as F

from skyrun.kernels.quantized_keys import HEAD_DIM, LARGEST, PRECISIONS, QuantizedKeys
from skyrun.kernels.torch import attention as torch_attention

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


def _split(t: Tensor) -> Tensor:
    return t.double().unflatten(1, (HEADS, -1)).transpose(0, 1)


def _keys(precision: str, k: Tensor, v: Tensor) -> QuantizedKeys:
    return QuantizedKeys(precision, *torch_attention.quantize_keys(k), *torch_attention.quantize_values(v, precision))


def error(precision: str, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The relative error of a precision."""
    exact = F.scaled_dot_product_attention(*map(_split, (q, k, v))).transpose(0, 1).flatten(1)
    return float((torch_attention.attend(q, _keys(precision, k, v)) - exact).norm() / exact.norm())


def parts(precision: str, q: Tensor, k: Tensor, v: Tensor) -> Iterator[float]:
    """The relative errors of probabilities, and of values, in 8 bits, with all else exact."""
    scores = _split(q) @ _split(k).mT / math.sqrt(HEAD_DIM)
    exact = scores.softmax(2) @ _split(v)
    rounded = torch_attention._in_8_bits(scores.float(), precision).double() @ _split(v)
    values = scores.softmax(2) @ torch_attention._values(_keys(precision, k, v)).double()
    for result in (rounded, values):
        yield float((result - exact).norm() / exact.norm())


def _table(columns: list[str], cells: Callable[[str], list[float]]) -> None:
    print("\n| softmax | " + " | ".join(columns) + " |")
    print("|" + " --- |" * (1 + len(columns)))
    for kind in SPREAD:
        print(f"| {kind} | " + " | ".join(f"{cell:.2%}" for cell in cells(kind)) + " |")


def main() -> None:
    """Print the tables."""
    quick = PRECISIONS[1:]
    print(environment())

    def whole(kind: str) -> list[float]:
        q, k, v = inputs(kind)
        return [error(name, q, k, values) for values in (v, v + 1) for name in quick]

    def apart(kind: str) -> list[float]:
        return [error("int8", *inputs(kind)), *(one for name in LARGEST for one in parts(name, *inputs(kind)))]

    _table([*quick, *(f"{name}, shared part" for name in quick)], whole)
    _table(["scores", *(f"{name}: {part}" for name in LARGEST for part in ("probabilities", "values"))], apart)


if __name__ == "__main__":
    main()
