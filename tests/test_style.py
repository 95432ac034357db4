"""What keeps the code readable: who imports whom, how long things are, linters, and words that do not belong."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("skyrun", "quant", "kernels", "presets")
ALLOWED = {
    "kernels": {"kernels"},
    "presets": {"presets"},
    "quant": {"quant", "kernels"},
    "skyrun": {"skyrun", "quant", "kernels", "presets"},  # its rooms have rules of their own
}
SHARED = "skyrun.kernels.machine.capability"  # facts of cards, for plans too
CUDA_USERS = {
    "skyrun/streaming/device.py",
    "skyrun/streaming/ring.py",
    "skyrun/streaming/staging.py",
    "skyrun/tools/convolution.py",
    "presets/machine/hardware.py",
    "kernels/machine/device.py",
    "kernels/machine/failures.py",
}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout")


def imports(path):
    """Packages of the project that a file imports, by folder."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names if node.module != SHARED]
        for name in names:
            parts = name.split(".")
            if parts[0] == "skyrun":
                yield parts[1] if len(parts) > 1 and parts[1] in PACKAGES else "skyrun"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_file(path):
    package, text = path.relative_to(ROOT).parts[0], path.read_text()
    for imported in imports(path):
        assert imported in ALLOWED[package], f"{package} must not import {imported}"
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, node.name
            public = not node.name.startswith("_") and node.col_offset == 0
            assert not public or ast.get_docstring(node), f"{node.name} has no docstring"
    assert "torch.cuda" not in text or str(path.relative_to(ROOT)) in CUDA_USERS


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    named = {".".join(f.parts if f.parts[0] == "skyrun" else ("skyrun", *f.parts)) for f in folders}
    assert set(listed) == named


def test_the_checkpoint_of_the_demo_is_in_the_wheel():
    room = ROOT / "skyrun" / "demo"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["skyrun.demo"]
    files = {path for path in (room / "checkpoint").rglob("*") if path.is_file()}
    assert files == {path for pattern in patterns for path in room.glob(pattern) if path.is_file()}
    assert 0 < sum(path.stat().st_size for path in files) <= 9e6


def tool(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff():
    tool("-m", "ruff", "check", ".")
    tool("-m", "ruff", "format", "--check", ".")


def test_mypy():
    tool("scripts/mypy")


def test_readme_commands_are_those_of_ci():
    readme = (ROOT / "README.md").read_text()
    (line,) = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "pytest" in line]
    assert line.strip() in readme


def test_links_in_the_docs_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert "://" in target or (path.parent / target).exists(), f"{path.name}: {target}"
