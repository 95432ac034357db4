"""Choosing types for a size: against trying every combination, and at the scale of the real model."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrun.errors import SkyrunError
from skyrun.quant.choose.allocate import Option, allocate
from skyrun.quant.choose.target_size import fit, parse_size, size_text

tables = st.lists(
    st.lists(st.builds(Option, st.just("T"), st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@given(tables, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_no_combination_is_better(options, share):
    least = sum(min(o.nbytes for o in table) for table in options)
    most = sum(max(o.nbytes for o in table) for table in options)
    budget = least + int(share * (most - least))
    chosen = allocate(options, budget)
    assert all(option in table for option, table in zip(chosen, options, strict=True))
    assert sum(option.nbytes for option in chosen) <= budget
    fitting = [c for c in itertools.product(*options) if sum(o.nbytes for o in c) <= budget]
    best = min(sum(o.error for o in combination) for combination in fitting)
    assert sum(option.error for option in chosen) == pytest.approx(best)


def test_sizes_without_a_common_divisor_are_nearly_filled():
    """400 matrices of two shapes and odd sizes: rounding to the cells of the table may cost no more than its size."""
    rng, bits = random.Random(1), {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}
    options = []
    for index in range(400):
        weights = 26_214_407 if index % 3 else 70_778_887
        scale = rng.lognormvariate(0, 0.5)
        options.append([Option(type, int(weights * b / 8), scale * 4**-b) for type, b in bits.items()])
    budget = 8_000_000_000
    chosen = allocate(options, budget)
    used = sum(option.nbytes for option in chosen)
    assert 0.998 * budget < used <= budget
    # The gradient of an optimal choice is even: the cheapest step up is worth no more than the dearest step down.
    unrounded = _relaxed(options, budget)
    assert sum(option.error for option in chosen) < 1.01 * unrounded


def _relaxed(options, budget):
    """Error when a tensor may have a mix of two types: what no choice can beat."""
    steps = []
    for table in options:
        ordered = sorted(table, key=lambda o: o.nbytes)
        steps += [
            ((a.error - b.error) / (b.nbytes - a.nbytes), b.nbytes - a.nbytes) for a, b in itertools.pairwise(ordered)
        ]
    error = sum(max(o.error for o in table) for table in options)
    left = budget - sum(min(o.nbytes for o in table) for table in options)
    for gain, nbytes in sorted(steps, reverse=True):
        taken = min(nbytes, left)
        error -= gain * taken
        left -= taken
    return error


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("9GB", 9 * 10**9), ("8.5 GiB", int(8.5 * 2**30)), ("900mb", 9 * 10**8), ("300M", 3 * 10**8), ("2KiB", 2048)],
)
def test_sizes_are_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "9 XB", "nine", "1e9", "9,5GB", "300", "0"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SkyrunError, match="is not a size"):
        parse_size(text)


def test_what_cannot_fit_says_what_would():
    sizes, errors = {"a": {"Q2_K": 10**9, "Q8_0": 3 * 10**9}}, {"a": {"Q2_K": 0.1, "Q8_0": 0.0}}
    assert fit(sizes, errors, {"a": 1}, 5, 10**9 + 5) == {"a": "Q2_K"}
    with pytest.raises(SkyrunError, match="500MB is too small for this model.* 1000000005 bytes") as error:
        fit(sizes, errors, {"a": 1}, 5, 5 * 10**8)
    assert error.value.hint == "say --target-size 1000.1MB or more"


def test_a_larger_matrix_counts_for_more():
    row = {"Q4_K": 0.01, "Q8_0": 0.0}
    sizes = {"small": {"Q4_K": 45, "Q8_0": 85}, "large": {"Q4_K": 90, "Q8_0": 170}}
    assert fit(sizes, {"small": row, "large": row}, {"small": 80, "large": 160}, 0, 215) == {
        "small": "Q4_K",
        "large": "Q8_0",
    }


def test_names_of_sizes():
    assert [size_text(n) for n in (9 * 10**9, 134_800_000, 314_572_800)] == ["9GB", "134.8MB", "314.6MB"]
