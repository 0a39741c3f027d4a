"""The record of a search (search.json) as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.alignment.heldout import ACCURACY, LOSS


def table(record: Mapping[str, Any]) -> str:
    """search.md: the choice, how sure it is, and every cell with its figures."""
    keys = record["varied"]
    cells = record["cells"]
    best = next(cell for cell in cells if cell["folder"] == record["best"])
    accuracy = any(ACCURACY in cell["heldout"] for cell in cells)
    head = [key.removeprefix("adapter.") for key in keys] + ["held-out rows"]
    head += [*(["accuracy [95 %]"] if accuracy else []), "loss [95 %]", "p against best"]
    lines = [
        f"# Search: {record['method']} on {record['dataset']}, {record['model']}, {record['adapter']}, "
        f"seed {record['seed']}",
        "",
        f"Best: **{best['name']}**. {record['verdict']}",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join('---' for _ in head)} |",
    ]
    for cell in cells:
        loss = cell["heldout"].get(LOSS)
        shown = [str(cell["values"][key]) for key in keys] + [str(loss["n"]) if loss else ""]
        shown += [_figure(cell["heldout"].get(ACCURACY))] if accuracy else []
        shown += ["failed" if cell["error"] else _figure(loss)]
        shown += ["best" if cell is best else "" if cell["p_adjusted"] is None else f"{cell['p_adjusted']:.3g}"]
        lines.append(f"| {' | '.join(shown)} |")
    failed = [f"* {cell['name']} failed: {cell['error']}" for cell in cells if cell["error"]]
    return "\n".join([*lines, *([""] if failed else []), *failed, ""])


def _figure(summary: Mapping[str, Any] | None) -> str:
    if summary is None or summary["mean"] is None:
        return ""
    interval = summary["interval"]
    return f"{summary['mean']:.4g}" + (f" [{interval['low']:.4g}, {interval['high']:.4g}]" if interval else "")
