"""Imports point strictly down, and the packages of one row never import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROWS = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("api", "serve_command", "doctor"),
    ("keywords",),
    ("reporting",),
    ("verify",),
    ("checks", "calibration"),
    ("scoring", "export"),
    ("artefact",),
    ("storage", "inputs"),
    ("arch", "recipe"),
    ("formats", "console", "manifest", "jsonfile"),
    ("options", "results"),
    ("extras", "memory", "progress", "resources", "retries", "transfer", "workers"),
    ("errors",),
    ("escaping",),
    ("redaction",),
)
"""From top to bottom; a package may import what stands in a lower row."""

ROOT = Path(__file__).parent.parent / "qtool"
LEVEL = {package: level for level, row in enumerate(reversed(ROWS)) for package in row}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_packages(path: Path) -> set[str]:
    """Packages of qtool that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qtool":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qtool.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    package = package_of(path)
    wrong = {other for other in imported_packages(path) - {package} if LEVEL[other] >= LEVEL[package]}
    assert not wrong


FAMILY = "qwen"
NAMING = {"cli": "help texts say to people what qtool is for"}
"""Packages that may name a family beside arch, and why."""


def words(tree: ast.Module) -> Iterator[str]:
    """Every name and every text of a module but its docstrings; comments are not among them."""
    documentation = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation:
            yield node.value
        for field in ("id", "attr", "arg", "name", "module"):
            if isinstance(word := getattr(node, field, None), str):
                yield word


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_only_arch_names_a_family(path):
    if package_of(path) not in ("arch", *NAMING):
        assert [word for word in words(ast.parse(path.read_text())) if FAMILY in word.lower()] == []


@pytest.mark.parametrize("package", ["storage", "formats"])
def test_storage_and_formats_know_no_family(package):
    for path in (ROOT / package).glob("*.py"):
        modules = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert {module for module in modules if module and module.startswith("qtool.arch")} <= {"qtool.arch.spec"}


def test_only_one_file_imports_modelopt():
    importing = [
        path.name for path in FILES if "import modelopt" in path.read_text() or "from modelopt" in path.read_text()
    ]
    assert importing == ["modelopt.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_library_neither_prints_nor_exits_nor_asserts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}"
        if isinstance(node, ast.Call) and package_of(path) not in ("cli", "console"):
            called = ast.unparse(node.func)
            assert called not in ("print", "sys.exit", "exit"), f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_file_states_its_purpose_and_stays_short(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert len(path.read_text().splitlines()) <= 600
