"""Tables of tensor names: recognise which model a file holds, rename its tensors, find missing and misshapen ones.

A table lists every tensor of a family once: its shape in terms of the model's dims, and its name in every naming in
use. The first naming is the one that skyrun writes and runs.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

Shape = tuple[int, ...]

_MOST_LINES = 6  # that are shown for problems of one kind
_LEAST_SHARE = 0.3  # of a table's rows that a file must hold to be recognised as that family


@dataclass(frozen=True)
class Row:
    """One tensor of a family.

    shape: one word per axis, such as "6*dim dim". names: one per naming; `{n}` stands for the index of the block.
    optional: whether files may leave it out, because no model that runs here reads it.
    """

    shape: str
    names: tuple[str, ...]
    optional: bool = False

    def name(self, naming: int = 0) -> str:
        """The tensor's name in a naming; its first name if the naming has none of its own."""
        return self.names[naming] if naming < len(self.names) else self.names[0]

    def for_block(self, index: int) -> "Row":
        return replace(self, names=tuple(name.replace("{n}", str(index)) for name in self.names))

    def sizes(self, dims: Mapping[str, int]) -> Shape | None:
        """The shape, or None if it depends on a dim that is not known."""
        words = [word.split("*") for word in self.shape.split()]
        if any(factor not in dims and not factor.isdigit() for word in words for factor in word):
            return None
        return tuple(prod(int(f) if f.isdigit() else dims[f] for f in word) for word in words)


@dataclass(frozen=True)
class Table:
    """All tensors of a family, in the order in which they are written.

    role: what the family does in a pipeline; several families may have the same role. namings: names of the namings.
    ignored: pattern of tensor names that files may hold but no model reads. tasks: what a transformer may have been
    trained for. needs: roles of the other models that these tasks need.
    """

    role: str
    namings: tuple[str, ...]
    rows: tuple[Row, ...]
    ignored: str = "(?!)"
    tasks: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def expand(self, layers: int = 0) -> list[Row]:
        """Every tensor of a model with that many blocks: those before the blocks, of each block, and after them."""
        block = [row for row in self.rows if "{n}" in row.name()]
        if not block:
            return list(self.rows)
        first = self.rows.index(block[0])
        blocks = [row.for_block(index) for index in range(layers) for row in block]
        after = [row for row in self.rows[first:] if "{n}" not in row.name()]
        return [*self.rows[:first], *blocks, *after]

    def shapes(self, naming: str, dims: Mapping[str, int]) -> dict[str, Shape]:
        """Every tensor's name in a naming and its shape, for a model whose dims (and "layers") are all known."""
        column = self.namings.index(naming)
        return {row.name(column): row.sizes(dims) or () for row in self.expand(dims.get("layers", 0))}

    def ignores(self, name: str) -> bool:
        return re.fullmatch(self.ignored, name) is not None

    def locate(self, name: str, naming: int) -> tuple[Row, int | None] | None:
        """The row that a name belongs to and the index of its block; None if the table has no such name."""
        rows, numbered = self._by_name[naming]
        if name in rows and "{n}" not in name:
            return rows[name], None
        if numbered and (found := numbered.fullmatch(name)):
            row = rows.get(f"{found[1]}{{n}}.{found[3]}")
            return (row, int(found[2])) if row else None
        return None

    def prefixes(self, names: Collection[str], naming: int) -> Iterator[str]:
        """Prefixes under which `names` hold at least _LEAST_SHARE of the table; "" may be one of them."""
        found: Counter[str] = Counter()
        for row in self.rows:
            ending = row.name(naming).replace("{n}", "0")
            for name in names:
                if name.endswith(ending) and (len(name) == len(ending) or name[-len(ending) - 1] == "."):
                    found[name.removesuffix(ending)] += 1
        return (prefix for prefix, count in found.items() if count >= _LEAST_SHARE * len(self.rows))

    @cached_property
    def _by_name(self) -> list[tuple[dict[str, Row], re.Pattern[str] | None]]:
        """For every naming its rows by name, and a pattern that matches the names of block tensors."""
        columns = []
        for naming in range(len(self.namings)):
            rows = {row.name(naming): row for row in self.rows}
            heads = {name.split("{n}.")[0] for name in rows if "{n}" in name}
            pattern = f"({'|'.join(map(re.escape, heads))})(0|[1-9][0-9]{{0,4}})\\.(.+)" if heads else None
            columns.append((rows, re.compile(pattern) if pattern else None))
        return columns


@dataclass(frozen=True)
class Match:
    """A family that was recognised in a file.

    naming, prefix: how the file names its tensors. names: the name that skyrun writes -> the name in the file.
    """

    table: Table
    naming: int
    prefix: str
    names: dict[str, str]

    @property
    def layers(self) -> int:
        """How many blocks the file has; a gap between them shows up as missing tensors."""
        located = (self.table.locate(name, 0) for name in self.names)
        return len({place[1] for place in located if place and place[1] is not None})

    def file_name(self, row: Row) -> str:
        return self.prefix + row.name(self.naming)

    def check(self, shapes: Mapping[str, Shape], known: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
        """The dims that the shapes (by name in the file) imply, and sentences about missing and misshapen tensors.

        known: dims that cannot be solved from shapes alone.
        """
        rows = self.table.expand(max(1, self.layers))  # if there is no block at all, the first is reported as missing
        present = [(row, shapes[self.file_name(row)]) for row in rows if self.file_name(row) in shapes]
        dims = solve(present, {**known, "layers": self.layers})
        missing, misshapen = [], []
        for row in rows:
            name, expected = self.file_name(row), row.sizes(dims)
            wanted = list(expected) if expected else row.shape
            if name not in shapes:
                if not row.optional:
                    missing.append(f"{name} is missing (expected shape {wanted})")
            elif expected is None or not fits(shapes[name], expected):
                misshapen.append(f"{name} has shape {list(shapes[name])}, expected {wanted}")
        return dims, [*brief(missing, "are missing"), *brief(misshapen, "have other shapes")]


def brief(problems: list[str], what: str) -> list[str]:
    """Problems of one kind; of many only the first few and how many others `what`, for example "are missing"."""
    if len(problems) <= _MOST_LINES:
        return problems
    shown = _MOST_LINES // 2
    return [*problems[:shown], f"and {len(problems) - shown} others {what}"]


def recognise(names: Collection[str], tables: Collection[Table]) -> list[Match]:
    """The families that a file holds, judged by its tensors' names alone. No tensor belongs to two of them."""
    candidates = []
    for table in tables:
        for naming in range(len(table.namings)):
            for prefix in table.prefixes(names, naming):
                found = {}
                for name in names:
                    if name.startswith(prefix) and (place := table.locate(name.removeprefix(prefix), naming)):
                        row, index = place
                        found[row.name() if index is None else row.for_block(index).name()] = name
                candidates.append(Match(table, naming, prefix, found))
    # Most tensors first; among equals the family that is closer to complete.
    candidates.sort(key=lambda match: (-len(match.names), len(match.table.expand(match.layers))))
    taken: set[str] = set()
    matches = []
    for match in candidates:
        if match.names and taken.isdisjoint(match.names.values()):
            taken.update(match.names.values())
            taken.update(name for name in names if match.table.ignores(name))  # these may look like another family's
            matches.append(match)
    return matches


def strays(names: Collection[str], matches: Collection[Match]) -> tuple[list[str], list[str]]:
    """Names that no match lists: first those under the prefix of a match, then those under the prefix of none.

    Names that a family ignores are in neither list.
    """
    listed = {name for match in matches for name in match.names.values()}
    unknown: list[str] = []
    others: list[str] = []
    for name in sorted(set(names) - listed):
        if any(match.table.ignores(name) or match.table.ignores(name.removeprefix(match.prefix)) for match in matches):
            continue
        owned = any(name.startswith(match.prefix) for match in matches)
        (unknown if owned else others).append(name)
    return unknown, others


def solve(found: Collection[tuple[Row, Shape]], known: Mapping[str, int]) -> dict[str, int]:
    """Solve the dims from rows and their actual shapes; each dim is taken from the first row that determines it."""
    dims = dict(known)
    while True:
        before = len(dims)
        for row, shape in found:
            words = row.shape.split()
            if len(words) == len(shape):
                for word, size in zip(words, shape, strict=True):
                    _solve_word(word, size, dims)
        for row, shape in found:  # if axes were merged or dropped, the number of values still determines a dim
            _solve_word("*".join(row.shape.split()), prod(shape), dims)
        if len(dims) == before:
            return dims


def _solve_word(word: str, size: int, dims: dict[str, int]) -> None:
    factors = word.split("*")
    unknown = [factor for factor in factors if not factor.isdigit() and factor not in dims]
    rest = prod(int(f) if f.isdigit() else dims[f] for f in factors if f not in unknown)
    if len(unknown) == 1 and size and rest and size % rest == 0:
        dims[unknown[0]] = size // rest


def fits(shape: Shape, expected: Shape) -> bool:
    """Whether a shape is the expected one, except for axes of length 1 and, beyond matrices, merged leading axes."""
    plain, target = [n for n in shape if n != 1], [n for n in expected if n != 1]
    merged = len(target) - len(plain) + 1
    return plain == target or (len(target) > 2 and merged > 1 and plain == [prod(target[:merged]), *target[merged:]])
