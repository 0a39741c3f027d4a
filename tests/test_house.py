"""The house: a module imports from its own floor or from floors below, and never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import harness

CORE = Path(harness.__file__).parent
FLOORS = {
    "words": "text errors plain_yaml config secrecy recipes specs records contracts hookspecs registry settings",
    "plan": (
        "provenance store stats catalog expression annotations merge_methods merge_names merge_config merge_recipe"
    ),
    "work": (
        "model_files regex_guard adapter_keys attaching checksums rendering "
        "models arms choose_engine engines generation_config data machine prompts lmeval_load lmeval_collect "
        "lmeval generate evaluation rows plan resume templates separation selection tokenise token_cache reference "
        "lineage training heldout pairwise_trainer pairwise align_checks align_folder align_plan policy align_export "
        "card packing precision prefix_sharing tensor_files merge_models merge_inputs merge_compute merge_write "
        "merge_folder merge_engine merge_stats merge_adapter merge_report fold fold_nf4 fold_probe alpaca "
        "judge_figures row_schema"
    ),
    "flow": (
        "progress alignment running loading answering scoring execute parity parity_run results report "
        "report_text report_html pairing compare compare_text leaderboard search search_text processes "
        "serve_check serve_child serving merging merge_html calibrate judges"
    ),
    "doors": (
        "cli cli_align cli_serve cli_merge cli_eval cli_judge process_child doctor demo demo_language "
        "demo_train scaffold show testing"
    ),
}
FLOOR_OF = {name: index for index, names in enumerate(FLOORS.values()) for name in names.split()}
# What says how far it is must be sayable from anywhere, and knows nothing of the rest.
FLOOR_OF["progress"] = 0


def imports_of(file: Path) -> set[str]:
    """Modules of the core that a file imports when it runs (not for type checkers alone)."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("harness."))
        if isinstance(node, ast.ImportFrom) and node.module == "harness":
            found.update(f"harness.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("harness."):
            found.add(node.module)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(file.read_text(encoding="utf-8")))
    return {name.split(".")[1] for name in found} & set(FLOOR_OF)


def modules() -> dict[str, list[Path]]:
    """Module name -> its files (several for a package)."""
    found = {file.stem: [file] for file in CORE.glob("*.py") if file.stem != "__init__"}
    found["testing"] = sorted((CORE / "testing").glob("*.py"))
    return found


def test_every_module_has_a_floor() -> None:
    assert set(modules()) <= set(FLOOR_OF), "name the floor of a new module in FLOORS"


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name: str) -> None:
    used = {other for file in modules()[name] for other in imports_of(file)} - {name}
    upward = {other for other in used if FLOOR_OF[other] > FLOOR_OF[name]}
    assert not upward, f"{name} imports {sorted(upward)} from a floor above"


def test_no_circles() -> None:
    edges = {name: {o for f in files for o in imports_of(f)} - {name} for name, files in modules().items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(edges.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_evaluation_knows_nothing_of_training() -> None:
    reached: set[str] = set()
    waiting = ["evaluation", "execute", "lmeval", "generate"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [other for file in modules()[name] for other in imports_of(file)]
    assert not reached & {"alignment", "training", "pairwise_trainer", "reference"}


def test_bundled_plugins_use_the_public_door() -> None:
    plugins = CORE.parent / "plugins" / "harness_plugins"
    allowed = {
        "alpaca", "annotations", "config", "contracts", "data", "errors", "hookspecs", "lmeval", "models", "pairwise",
        "recipes",
        "records", "secrecy", "specs",
    }  # fmt: skip
    for file in plugins.glob("*.py"):
        beyond = imports_of(file) - allowed
        assert not beyond, f"{file.name} imports {sorted(beyond)}"
