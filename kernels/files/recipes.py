"""The mix of types that a file's type stands for, by the names of a transformer's or an encoder's matrices."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from skyrun.kernels.errors import SkyrunError

_VALUE = re.compile(r"\.v\.weight$|\.attn_v\.weight$")
_EXTRA_VALUE = re.compile(r"\.v_img\.weight$|\.kv_linear\.weight$")  # of a talking avatar: images, speech
_DOWN = re.compile(r"\.ffn\.2\.weight$|\.ffn_down\.weight$")


@dataclass(frozen=True)
class Recipe:
    """A file's type: the type of most matrices of its blocks, and of those that lose most when they have few bits.

    file_type: llama.cpp's number for it. value: the type of attention's value projections; early_value: of the first
    `early` of them in a file. down: of the second matrix of a feed-forward. The mixes are those with which the
    community quantizes Wan, so sizes compare.
    """

    file_type: int
    base: str
    value: str
    down: str
    early: int = 0
    early_value: str = ""


def _pure(type: str, file_type: int) -> Recipe:
    return Recipe(file_type, type, type, type)


# What `--quant` accepts, best first. A bare Q3_K, Q4_K or Q5_K has no mix.
RECIPES = {
    "F32": _pure("F32", 0),
    "F16": _pure("F16", 1),
    "BF16": _pure("BF16", 32),
    "Q8_0": _pure("Q8_0", 7),
    "Q6_K": _pure("Q6_K", 18),
    "Q5_K_M": Recipe(17, "Q5_K", "Q6_K", "Q6_K"),
    "Q5_K_S": _pure("Q5_K", 16),
    "Q5_K": _pure("Q5_K", 16),
    "Q5_1": _pure("Q5_1", 9),
    "Q5_0": Recipe(8, "Q5_0", "Q5_0", "Q5_1"),
    "Q4_K_M": Recipe(15, "Q4_K", "Q6_K", "Q6_K"),
    "Q4_K_S": Recipe(14, "Q4_K", "Q4_K", "Q5_K", early=4, early_value="Q5_K"),
    "Q4_K": _pure("Q4_K", 14),
    "Q4_1": _pure("Q4_1", 3),
    "Q4_0": Recipe(2, "Q4_0", "Q4_0", "Q4_1"),
    "IQ4_NL": _pure("IQ4_NL", 25),
    "IQ4_XS": _pure("IQ4_XS", 30),
    "Q3_K_L": Recipe(13, "Q3_K", "Q5_K", "Q5_K"),
    "Q3_K_M": Recipe(12, "Q3_K", "Q4_K", "Q4_K", early=2, early_value="Q5_K"),
    "Q3_K_S": _pure("Q3_K", 11),
    "Q3_K": _pure("Q3_K", 11),
    "Q2_K": Recipe(10, "Q2_K", "Q3_K", "Q2_K"),
}


def find_recipe(quant: str) -> Recipe:
    """The recipe called `quant`; SkyrunError lists the known ones."""
    if quant.upper() not in RECIPES:
        raise SkyrunError(f"cannot write a file of type {quant!r}", f"types: {', '.join(RECIPES)}")
    return RECIPES[quant.upper()]


def recipe_types(names: Iterable[str], recipe: Recipe) -> dict[str, str]:
    """The recipe's type for each matrix, by its name, in file order: the first value projections count."""
    types, values = {}, 0
    for name in names:
        type = recipe.base
        if _VALUE.search(name):
            type = recipe.early_value if values < recipe.early else recipe.value
            values += 1
        elif _EXTRA_VALUE.search(name):
            type = recipe.value
        elif _DOWN.search(name):
            type = recipe.down
        types[name] = type
    return types
