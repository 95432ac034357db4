"""Which tests need Triton: without it the kernels that they compare cannot be made."""

import ast
from collections.abc import Iterator
from pathlib import Path

_FOLDERS = (Path(__file__).parent, Path(__file__).parent.parent / "benchmarks")
_KERNELS = "skyrun.kernels.triton."


def files_that_need_triton() -> list[str]:
    """The names of test files that import Triton, a kernel in it, or a file beside them that does."""
    imports = {path.stem: set(_imported(path)) for folder in _FOLDERS for path in folder.glob("*.py")}
    needing = {"triton"}
    while more := {name for name, imported in imports.items() if imported & needing} - needing:
        needing |= more
    return sorted(f"{name}.py" for name in needing if name.startswith("test_"))


def _imported(path: Path) -> Iterator[str]:
    """What a file imports when it is imported: the first part of each name, and "triton" for a kernel in it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield "triton" if name.startswith(_KERNELS) else name.partition(".")[0]
