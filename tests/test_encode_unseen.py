"""Affine encoders on weights that their clips and steps were not chosen on, against ggml's errors on the same draws.

`benchmarks/unseen_weights.py --record` wrote ggml's errors; it also compares more draws.
"""

import json
from pathlib import Path

import pytest
import torch

from skyrun.quant import quantize

with pytest.MonkeyPatch.context() as patch:  # benchmarks are not part of the package
    patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from encoders import error
    from unseen_weights import CASES, draw

GGML = json.loads((Path(__file__).parent / "data" / "unseen.json").read_text())
LIMITS = {
    "Q5_K": {"gauss": 0.966, "student": 0.956, "trained": 0.964},
    "Q4_K": {"gauss": 0.986, "student": 0.976, "trained": 0.986},
    "Q2_K": {"gauss": 0.968, "student": 0.945, "trained": 0.966},
    "Q5_1": {"gauss": 0.983, "student": 0.984, "trained": 0.983},
    "Q4_1": {"gauss": 0.987, "student": 0.985, "trained": 0.987},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("type", LIMITS)
def test_error_on_unseen_weights(type, case):
    draws = [draw(case, number) for number in range(len(GGML[type][case]))]
    ratios = [error(x, quantize(x, type), type) / ggml for x, ggml in zip(draws, GGML[type][case], strict=True)]
    assert torch.tensor(ratios).mean() <= LIMITS[type][case]
