"""The house: an order of packages, no circle between files, no private name across modules, one door for plugins.

Imports count wherever they stand: in functions and for type checkers alone, too.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import harness

CORE = Path(harness.__file__).parent
PLUGINS = CORE.parent / "plugins" / "harness_plugins"
ROOTS = ("harness", "harness_plugins")
ORDER = [
    "core",
    "contracts",
    "steps",
    "models",
    "data",
    "tasks",
    "report",
    "merging",
    "evaluation",
    "alignment",
    "study",
    "judges",
    "serving",
    "publishing",
    "demo",
    "testing",
    "cli",
]
"""A package imports from those before it, and from itself."""


def name_of(file: Path) -> str:
    """Dotted module name of a file of the core or of the bundled plugins."""
    root = CORE if file.is_relative_to(CORE) else PLUGINS
    parts = [root.name, *file.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for root in (CORE, PLUGINS) for file in sorted(root.rglob("*.py"))}


@cache
def imported(name: str) -> frozenset[tuple[str, str]]:
    """Pairs (module, name in it, or empty) that a module imports from the core and the bundled plugins."""
    return frozenset(_imported(ast.parse(FILES[name].read_text(encoding="utf-8"))))


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] in ROOTS)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            if node.module is not None and node.module.split(".")[0] in ROOTS:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield (inner, "") if inner in FILES else (node.module, alias.name)


def package_of(module: str) -> str:
    """The package of the core that a module lies in; empty for the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def modules_in(package: str) -> list[str]:
    """Modules of a package of the core."""
    return [name for name in FILES if name.startswith("harness.") and package_of(name) == package]


def reached(*start: str) -> set[str]:
    """Packages of the core that some modules reach, over any number of imports."""
    waiting, seen = list(start), set(start)
    while waiting:
        new = {module for module, _ in imported(waiting.pop()) if module.startswith("harness.")} - seen
        seen |= new
        waiting += new
    return {package_of(module) for module in seen}


def test_nothing_lies_at_the_root() -> None:
    assert [file.name for file in CORE.glob("*.py")] == ["__init__.py"]
    assert {child.name for child in CORE.iterdir() if child.is_dir() and child.name != "__pycache__"} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_down(package: str) -> None:
    allowed = ORDER[: ORDER.index(package) + 1]
    upward = {
        f"{name} imports {module}"
        for name in modules_in(package)
        for module, _ in imported(name)
        if module.startswith("harness.") and package_of(module) not in allowed
    }
    assert not upward, f"{package} may import from {', '.join(allowed)}"


def test_no_circle_between_files() -> None:
    edges = {name: {module for module, _ in imported(name)} - {name} for name in FILES if name != "harness"}
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_private_name_crosses_modules() -> None:
    crossing = {
        f"{name} imports {module}.{what}"
        for name in FILES
        for module, what in imported(name)
        if what.startswith("_") and not what.startswith("__")
    }
    assert not crossing


def test_bundled_plugins_use_the_public_door() -> None:
    beyond = {
        f"{name} imports {module}"
        for name in FILES
        if name.startswith("harness_plugins")
        for module, _ in imported(name)
        if module.startswith("harness.")
    }
    assert not beyond, "a stranger imports from `harness`"


def test_the_door_says_the_same_to_type_checkers() -> None:
    typed = {
        (node.module, alias.asname)
        for node in ast.walk(ast.parse((CORE / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("harness.")
        for alias in node.names
    }
    assert typed == {(module, name) for module, names in harness._HOME.items() for name in names.split()}
    assert all(getattr(harness, name) is not None for name in harness.__all__)


def test_evaluation_knows_nothing_of_training() -> None:
    assert "alignment" not in reached(*modules_in("evaluation"))


def test_reports_know_no_kind_of_step() -> None:
    assert not reached(*modules_in("report")) & {"merging", "evaluation", "alignment"}
