"""What `--attention` says: a precision, whether something may be skipped, and what that may cost."""

import re
from dataclasses import dataclass

# Relative error of attention on a peaked softmax, by its precision (docs/kernels.md).
ATTENTION_ERRORS = {"exact": 0.0, "int8": 0.019, "full-int8": 0.022, "fp8": 0.034}
ATTENTIONS = tuple(ATTENTION_ERRORS)
USUAL_BOUND = 0.01  # relative error that skipping may cost
USUAL_DENSITY = 0.5  # the share of tiles that is read, until a run has measured it
# What a page offers; every other bound can be typed.
OFFERED = (*ATTENTIONS, "sparse", *(f"{name},sparse" for name in ATTENTIONS))
_MOST = 50.0  # percent
_SPARSE = re.compile(r"sparse(?::(\d{1,3}(?:\.\d{1,6})?)%?)?")


@dataclass(frozen=True)
class Attention:
    """How self-attention is computed.

    precision: of ATTENTIONS; None leaves it to the plan. bound: the relative error that skipping may cost; None:
    nothing is skipped.
    """

    precision: str | None = None
    bound: float | None = None

    def __str__(self) -> str:
        skips = [] if self.bound is None else [f"sparse:{100 * self.bound:.6g}%"]
        return ",".join([*([self.precision] if self.precision else []), *skips])


def parse_attention(text: str) -> Attention:
    """Read "int8", "sparse", "int8,sparse" or "int8,sparse:0.5%". ValueError with a sentence for anything else."""
    first, _, rest = text.strip().lower().partition(",")
    precision = first if first in ATTENTIONS else None
    skips = rest.strip() if precision else text.strip().lower()
    match = _SPARSE.fullmatch(skips)
    if match is None and (skips or precision is None or "," in text):
        known = ", ".join(ATTENTIONS)
        raise ValueError(f"unknown attention {text!r}, expected {known}, sparse:P%, or a precision,sparse:P%")
    if match is None:
        return Attention(precision)
    percent = 100 * USUAL_BOUND if match[1] is None else float(match[1])
    if percent > _MOST:
        raise ValueError(f"attention {text!r}: an error of {percent:g} % is too much, expected at most {_MOST:g} %")
    return Attention(precision, percent / 100)
