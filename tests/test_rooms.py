"""The house: which room may import which, how large rooms are, and what must not be in them."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "skyrun"
FILES = sorted(PACKAGE.rglob("*.py"))
ALL_FILES = [*FILES, *(path for room in ("kernels", "presets", "quant") for path in (ROOT / room).rglob("*.py"))]
LEAVES = {"events", "errors", "units", "version", "kernels"}  # everyone may import these
MAY = {
    "tasks": set(),
    "media": set(),
    "demo": set(),
    "parallel": set(),
    "streaming": {"presets"},
    "models": {"streaming", "parallel"},
    "planning": {"tasks", "media", "streaming", "models", "presets"},
    "pipelines": {"planning", "models", "streaming", "parallel", "media", "tasks", "presets"},
    "hub": {"demo", "planning", "tasks", "streaming", "quant"},
    "engine": {"pipelines", "planning", "models", "streaming", "parallel", "media", "tasks", "presets"},
    "tools": {"pipelines", "planning", "models", "streaming", "parallel", "media", "tasks", "presets", "quant", "hub"},
    "errors": set(),
    "events": {"presets"},
    "units": set(),
    "version": set(),
}
MAY["cli"] = {*MAY, "quant", "presets"} - {"web"}
MAY["web"] = {*MAY, "quant", "presets"} - {"cli"}
TASK_NAMES = {"r2v", "v2v", "shot", "a2v", "t2v", "i2v"}
LAZY = {"skyrun", "skyrun.kernels", "skyrun.quant"}  # hand names out when they are asked for
ANNOTATED = {"skyrun.presets.advice", "skyrun.presets.assumptions", "skyrun.presets.timing"}  # with the type of a plan
MAX_FILES = 15  # of a room; folders in it are rooms of their own
MIN_LINES = 40  # of a file that only one other imports

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout")


def room(path):
    """The first folder, or the file itself at the top; "" for the package and its entry."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem.removeprefix("__init__").removeprefix("__main__")


@cache
def imported(path):
    """Modules of the project that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= MODULES.keys() else {*names, node.module or ""}
    return {name for name in found if name.startswith("skyrun.")}


def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "skyrun" else ("skyrun", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in ALL_FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_go_down(path):
    here = room(path)
    for name in imported(path):
        there = name.split(".")[1]
        if here and there != here and there not in LEAVES and (f"skyrun.{there}" in MODULES or there in MAY):
            assert there in MAY[here], f"{here} must not import {there}: {name}"


def test_there_is_no_circle():
    arrows = {name: {other for other in imported(path) if other in MODULES} - {name} for name, path in MODULES.items()}
    left = {name: others for name, others in arrows.items() if name not in LAZY | ANNOTATED}
    while left:
        free = {name for name, others in left.items() if not others & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in free}


def test_rooms_are_small():
    sizes = Counter(path.parent for path in ALL_FILES)
    assert {str(folder): count for folder, count in sizes.items() if count > MAX_FILES} == {}


def test_no_file_is_a_fragment():
    importers = Counter(name for path in ALL_FILES for name in imported(path) if name in MODULES)
    commands = PACKAGE / "cli" / "commands"  # found by their names
    fragments = [
        name
        for name, path in MODULES.items()
        if path in FILES
        and importers[name] == 1
        and path.name != "__init__.py"
        and path.parent not in (PACKAGE, commands)
        and len(path.read_text().splitlines()) < MIN_LINES
    ]
    assert fragments == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_must_not_be_in_a_room(path):
    tree, here = ast.parse(path.read_text()), room(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in TASK_NAMES:
            assert here == "tasks", f"line {node.lineno}: only tasks/ may name a task"
        if here not in ("cli", "web"):
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            assert name not in ("print", "Namespace"), f"line {node.lineno}: faces print, nothing else does"
            if isinstance(node, ast.Attribute) and node.attr in ("stderr", "stdout"):
                assert not (isinstance(node.value, ast.Name) and node.value.id == "sys"), f"line {node.lineno}"


def loaded(code):
    """Modules in memory after the code ran in a process of its own."""
    script = f"import sys\n{code}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import skyrun.errors", {"numpy", "torch", "gguf"}),
        ("import skyrun.tasks, skyrun.cli.parser", {"torch", "numpy"}),
        ("import skyrun.tools.doctor, skyrun.tools.inspect", {"torch"}),
        ("import skyrun.web.command, skyrun.web.app", {"torch", "numpy", "PIL", "av", "huggingface_hub"}),
    ],
)
def test_what_is_not_loaded(code, absent):
    assert not loaded(code) & absent


def test_a_run_of_local_files_loads_no_quantizer(converted, run_command):
    command = [*run_command, "--model", str(converted("Q8_0")), "--dry-run"]
    code = f"from skyrun.cli import main\nassert main({command}) == 0"
    modules = loaded(code)
    assert "skyrun.planning.job" in modules
    assert not {name for name in modules if name.startswith(("skyrun.quant", "huggingface_hub"))}
