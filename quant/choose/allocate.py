"""Choose one option for each tensor so that the sizes fit a budget and the sum of errors is least."""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import numpy as np

_MAX_CELLS = 1 << 16  # of the table by size; sizes are rounded up to multiples of budget / cells


class Option(NamedTuple):
    """A type that a tensor could have, with its size and the error that it adds."""

    type: str
    nbytes: int
    error: float


def allocate(options: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """The best choice within `budget` bytes: the multiple-choice knapsack, solved by dynamic programming over sizes.

    The solution is exact if sizes have a common divisor of at least budget / 65536. Otherwise sizes are rounded up to
    multiples of that, and the bytes left over go to the upgrades that gain most per byte. The smallest options must
    fit.
    """
    tables = [_efficient(choices) for choices in options]
    smallest = [min(option.nbytes for option in table) for table in tables]
    room = budget - sum(smallest)
    assert room >= 0, "the smallest options must fit"
    steps = [o.nbytes - low for table, low in zip(tables, smallest, strict=True) for o in table]
    common = gcd(*steps) or 1
    unit = max(common, -(-room // _MAX_CELLS))
    costs = [[-(-(o.nbytes - low) // unit) for o in table] for table, low in zip(tables, smallest, strict=True)]
    chosen = [table[pick] for table, pick in zip(tables, _solve(tables, costs, room // unit), strict=True)]
    return chosen if unit == common else _fill(tables, chosen, budget)


def _efficient(choices: Sequence[Option]) -> list[Option]:
    """The options that have less error than every smaller one, smallest first."""
    kept: list[Option] = []
    for option in sorted(choices, key=lambda option: (option.nbytes, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def _solve(tables: list[list[Option]], costs: list[list[int]], room: int) -> list[int]:
    """The index of the chosen option in each table. best[j]: the least error of the tables so far at a cost of j."""
    best = np.zeros(room + 1)
    picks = np.zeros((len(tables), room + 1), np.uint8)
    for row, (table, cost) in enumerate(zip(tables, costs, strict=True)):
        total = best + table[0].error  # the first costs nothing
        for index in range(1, len(table)):
            if cost[index] > room:
                break
            with_it = best[: room + 1 - cost[index]] + table[index].error
            better = with_it < total[cost[index] :]
            total[cost[index] :][better] = with_it[better]
            picks[row, cost[index] :][better] = index
        best = total
    chosen, left = [], room
    for row in range(len(tables) - 1, -1, -1):
        chosen.append(int(picks[row, left]))
        left -= costs[row][chosen[-1]]
    return chosen[::-1]


def _fill(tables: list[list[Option]], chosen: list[Option], budget: int) -> list[Option]:
    """Spend the bytes that rounding left over: take the upgrade with the most gain per byte as long as one fits."""
    left = budget - sum(option.nbytes for option in chosen)
    while True:
        upgrades = [
            ((now.error - option.error) / (option.nbytes - now.nbytes), index, option)
            for index, (table, now) in enumerate(zip(tables, chosen, strict=True))
            for option in table
            if 0 < option.nbytes - now.nbytes <= left
        ]
        if not upgrades:
            return chosen
        _, index, option = max(upgrades)
        left -= option.nbytes - chosen[index].nbytes
        chosen[index] = option
