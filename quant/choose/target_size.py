"""Choose types by a target size instead of a recipe: those that fit it with the least error."""

import re

from skyrun.kernels import block_format
from skyrun.kernels.errors import SkyrunError
from skyrun.quant.choose.allocate import Option, allocate
from skyrun.quant.encoders.encode import ENCODERS
from skyrun.quant.sources.families import ModelTensor

# How much a weight's error counts where it is not 1. In a trained model an error that softmax smooths, or that goes
# through cross-attention, hardly changes the clip: benchmarks/trained.py measures it.
_INFLUENCE = ((re.compile(r"cross_attn\."), 1 / 16), (re.compile(r"self_attn\.[qk]\."), 1 / 8))
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def parse_size(text: str) -> int:
    """The number of bytes in "9GB", "8.5 GiB" or "900M". Raises SkyrunError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)B?", text.strip().upper())
    if not match:
        raise SkyrunError(f"{text!r} is not a size", "write it as 9GB, 8.5GiB or 900MB")
    return int(float(match[1]) * _UNITS[match[2]])


def size_text(nbytes: int) -> str:
    """A size as in file names and messages, for example "9GB"."""
    unit = "G" if nbytes >= 10**9 else "M"
    return f"{nbytes / _UNITS[unit]:.4g}{unit}B"


def candidates(tensor: ModelTensor) -> list[str]:
    """The types that a matrix could have: all quantized types that can hold its rows, and one of 16 bits."""
    plain = tensor.source.dtype if tensor.source.dtype in ("F16", "BF16") else "BF16"
    blocks = [name for name in ENCODERS if block_format(name).block_size > 1]
    return [name for name in blocks if tensor.shape[-1] % block_format(name).block_size == 0] + [plain]


def influence(tensor: ModelTensor) -> float:
    """How much the relative error of a matrix counts: its weights, fewer where the clip depends less on them."""
    shares = (share for pattern, share in _INFLUENCE if pattern.search(tensor.name))
    return tensor.source.numel * next(shares, 1.0)


def fit(
    sizes: dict[str, dict[str, int]],
    errors: dict[str, dict[str, float]],
    influences: dict[str, float],
    rest: int,
    target: int,
) -> dict[str, str]:
    """The type of each matrix, by name, with which the file has at most `target` bytes and the least sum of errors.

    Args:
        sizes: bytes of each matrix, by name and type.
        errors: noise over signal in each matrix's output, by name and type.
        influences: how much the error of each matrix counts.
        rest: bytes of the file that are not matrices.
        target: the most bytes that the file may have.

    Raises SkyrunError, which names the smallest possible size, if that is above the target.
    """
    tables = [
        [Option(type, sizes[name][type], influences[name] * error) for type, error in row.items()]
        for name, row in errors.items()
    ]
    least = rest + sum(min(option.nbytes for option in table) for table in tables)
    budget = target - rest
    if least > target:
        raise SkyrunError(
            f"{size_text(target)} is too small for this model: the smallest its file can be is {least} bytes",
            f"say --target-size {-(-least // 10**5) / 10:.1f}MB or more",
        )
    return {name: option.type for name, option in zip(errors, allocate(tables, budget), strict=True)}
