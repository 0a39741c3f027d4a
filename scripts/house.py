"""Figures about how the code is laid out: `python scripts/house.py [CHECKOUT ...]`, a column for each."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOTS = ("harness", "harness_plugins")


def modules(checkout: Path) -> dict[str, Path]:
    """Dotted name -> file, of the core and of the bundled plugins."""
    found = {}
    for root in (checkout / "harness", checkout / "plugins" / "harness_plugins"):
        for file in sorted(root.rglob("*.py")):
            parts = [root.name, *file.relative_to(root).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(tree: ast.AST, known: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Pairs (module, name) that are imported, in functions and for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] in ROOTS)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ROOTS:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, "") if inner in known else (node.module, alias.name)


def circles(edges: dict[str, set[str]]) -> int:
    """Number of groups of files that import each other in a circle."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = edges.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        reach[start] = seen
    rings = {frozenset(other for other in reach[one] if one in reach.get(other, ())) for one in edges}
    return sum(len(ring) > 1 for ring in rings)


def figures(checkout: Path) -> dict[str, int]:
    """What is counted in one checkout."""
    files = modules(checkout)
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    used = {name: set(imports(tree, files)) for name, tree in trees.items()}
    edges = {name: {module for module, _ in found} - {name} for name, found in used.items() if name != "harness"}
    core = checkout / "harness"

    def part(name: str) -> str:
        return name.split(".")[1] if name.count(".") else name

    arrows = {
        (part(name), part(module))
        for name, found in edges.items()
        for module in found
        if name.startswith("harness.") and module.startswith("harness.") and part(name) != part(module)
    }
    contracts = [file for name, file in files.items() if name.startswith("harness.contracts")]
    annotations = [
        node
        for file in contracts
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "Any"
    ]
    return {
        "files in harness/": sum(file.parent == core for file in files.values()),
        "packages": sum(file.name == "__init__.py" and file.parent.parent == core for file in files.values()),
        "arrows between what lies in harness/": len(arrows),
        "circles between files": circles(edges),
        "private names imported across modules": len(
            {
                (name, what)
                for name, found in used.items()
                for _, what in found
                if what.startswith("_") and not what.startswith("__")
            }
        ),
        "bundled plugins that go round the door": sum(
            any(module.startswith("harness.") for module, _ in found)
            for name, found in used.items()
            if name.startswith("harness_plugins")
        ),
        "`Any` in the contracts": len(annotations),
        "lines of harness and plugins": sum(
            len(file.read_text(encoding="utf-8").splitlines()) for file in files.values()
        ),
    }


def main() -> None:
    """Print the table."""
    checkouts = [Path(argument) for argument in sys.argv[1:]] or [Path(__file__).parents[1]]
    columns = [figures(checkout) for checkout in checkouts]
    for name in columns[0]:
        print(f"{name:40}" + "".join(f"{column[name]:>10,}" for column in columns))


if __name__ == "__main__":
    main()
