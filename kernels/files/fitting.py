"""Check that a file's tensors are a whole model: none is missing and their shapes agree. No tensor data is read."""

from collections.abc import Mapping
from pathlib import Path

from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.names import Shape, Table, solve


def check_tensors(
    path: Path, table: Table, shapes: Mapping[str, Shape], hint: str, layers: int = 0, **known: int
) -> dict[str, int]:
    """The dims that the tensors' shapes imply.

    Args:
        path: the file, named in the error.
        table: the tensors that the model reads, under the names it reads them by.
        shapes: shapes of the file's tensors by name; the file may have more tensors than the table lists.
        hint: what the error tells the user to do.
        layers: how many blocks the model reads.
        known: dims that are fixed whatever the tensors say.

    Raises SkyrunError if a tensor is missing or its shape disagrees with those of the others.
    """
    rows = {row.name(): row for row in table.expand(layers)}
    dims = solve([(row, shapes[name]) for name, row in rows.items() if name in shapes], known)
    problems = []
    for name, row in rows.items():
        owner, short = str(path), name
        place = table.locate(name, 0)
        if place is not None and place[1] is not None:
            owner, short = f"block {place[1]} of {path}", place[0].name().split("{n}.")[1]
        expected, found = row.sizes(dims), shapes.get(name)
        if found is None:
            problems.append(f"{owner} has no tensor {short}")
        elif expected != found:
            wanted = row.shape if expected is None else list(expected)
            problems.append(
                f"{owner} has tensors that do not fit each other: {short} has shape {list(found)}, expected {wanted}"
            )
    if problems:
        raise SkyrunError.listing(f"{path} is not a whole model", problems, hint)
    return dims
