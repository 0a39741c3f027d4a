"""The page of one arm: its numbers in full, seed by seed, how it was made, what that did, and what it took.

Everything is read from the record of the step that made it; what a record does not say is left out, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError
from harness.core.text import ARROWS, MINUS, clip, number, portable, visible
from harness.report.board.model import Board, BoardRow, Cell, Column, SeedCell
from harness.report.compare_text import ends_text, p_text, signed
from harness.report.figures.charts import Curve, Value, curves
from harness.report.figures.svg import STYLE
from harness.report.pages.board import factors_of
from harness.report.pages.page import render_page
from harness.report.read import StepFolders, StepResult
from harness.steps.files import read_json

KINDS = ("align", "merge")
"""Kinds of steps that make an arm."""
CURVES = {
    "loss": ("loss", "eval_loss"),
    "margin": ("rewards/margins", "eval_rewards/margins"),
    "accuracy": ("rewards/accuracies", "eval_rewards/accuracies", "mean_token_accuracy"),
}
"""Figures of a training, by the names that trainers log them under."""
MOST_POINTS = 400
"""Points of a curve; of a longer log every second, third ... line is drawn."""
MOST_TEXT = 200


@dataclass(frozen=True)
class Made:
    """The record of the step that made one seed of an arm."""

    seed: str
    folder: Path
    info: Mapping[str, Any]
    status: Mapping[str, Any]

    @property
    def gpu_seconds(self) -> float | None:
        """Seconds times GPUs, as the record says; None where it does not, or no GPU took part."""
        found = (self.status.get("costs") or {}).get("gpu_seconds")
        return float(found) if isinstance(found, int | float) and found > 0 else None


class MadeSteps:
    """Finds the records of steps that made arms, in some run folders."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._folders = [StepFolders(root) for root in roots]

    def of(self, row: BoardRow) -> list[Made]:
        """The records of a row's seeds that are there.

        Raises:
            CorruptionError: one is damaged.
        """
        return [found for seed in row.seeds if (found := self._find(seed.name, seed.made_by, seed.sources)) is not None]

    def _find(self, seed: str, step_id: str | None, sources: Sequence[int]) -> Made | None:
        if step_id is None:
            return None
        for source in sources:
            for kind in KINDS:
                for folder in self._folders[source].of(kind, step_id):
                    step = folder / "step.json"
                    if step.is_file() and (info := read_json(step)).get("id") == step_id:
                        status = folder / "status.json"
                        return Made(seed, folder, info, read_json(status) if status.is_file() else {})
        return None


def render_arm(
    board: Board,
    row: BoardRow,
    made: Sequence[Made],
    links: Mapping[str, str],
    scores: Mapping[str, StepResult],
) -> str:
    """The page of one row.

    Args:
        board: the whole.
        row: the arm.
        made: records of the steps that made it.
        links: name of a row -> its page, beside this one.
        scores: id -> scores step, whose leaf tasks are shown.
    """
    columns = [column for column in board.columns if column.key in row.cells]
    return render_page(
        "arm.html.j2",
        styles=["board.css"],
        more_style=STYLE,
        kicker="Arm",
        title=row.name,
        board=board,
        row=row,
        facts=list(factors_of(row).items()),
        parents=[(name, links.get(name, "")) for name in row.parents],
        numbers=[_numbers(column, row.cells[column.key]) for column in columns],
        columns=columns,
        seeds=[
            (seed.name, [_seed_text(seed.cells.get(column.key)) for column in columns], seed.missing)
            for seed in row.seeds
        ],
        leaves=[leaf for column in columns if (leaf := _leaves(column, row, scores)) is not None],
        figure=_training(made),
        recipe=_recipe(made),
        merge=_merge(made),
        costs=_costs(made),
        steps=[(one.seed, _step(one)) for one in made],
    )


def _numbers(column: Column, cell: Cell) -> dict[str, str]:
    one = cell.difference
    told = [cell.withheld, cell.note, one.note if one is not None else None]
    return {
        "label": column.label,
        "metric": f"{column.metric} {ARROWS[column.higher_is_better]}".rstrip(),
        "mean": "withheld" if cell.withheld is not None else number(cell.mean, minus=MINUS),
        "interval": "–" if cell.ci95 is None else _ends(cell.ci95),
        "n": f"{cell.n:,}",
        "odd": f"{cell.n_unscored:,}, {cell.n_truncated:,}",
        "rank": "–" if cell.rank is None else str(cell.rank),
        "difference": "–" if one is None else signed(one.difference).replace("-", MINUS),
        "adjusted": "–" if one is None else ends_text(one.ci_adjusted).replace("-", MINUS) or "–",
        "p": "–" if one is None else p_text(one.p_adjusted),
        "detectable": "–" if one is None else number(one.detectable_adjusted),
        "verdict": "–" if one is None else one.verdict,
        "kind": one.verdict if one is not None and one.verdict in ("better", "worse") else "quiet",
        "note": "; ".join(dict.fromkeys(note for note in told if note)),
    }


def _ends(ends: tuple[float, float]) -> str:
    return f"[{number(ends[0], minus=MINUS)}, {number(ends[1], minus=MINUS)}]"


def _seed_text(cell: SeedCell | None) -> str:
    if cell is None:
        return "–"
    if cell.withheld is not None:
        return "withheld"
    return number(cell.mean, minus=MINUS) + ("" if cell.ci95 is None else f" {_ends(cell.ci95)}")


def _leaves(column: Column, row: BoardRow, scores: Mapping[str, StepResult]) -> dict[str, Any] | None:
    """The leaf tasks of a column, a column for each seed; None where there are none."""
    found: dict[str, dict[str, str]] = {}
    seeds = [seed for seed in row.seeds if column.key in seed.cells and seed.cells[column.key].step in scores]
    for seed in seeds:
        for one in scores[seed.cells[column.key].step].rows:
            if one.leaf is not None and one.metric == column.metric:
                text = "withheld" if one.withheld is not None else number(one.mean, minus=MINUS)
                ends = "" if one.ci95 is None or one.withheld is not None else f" {_ends(one.ci95)}"
                found.setdefault(one.leaf, {})[seed.name] = f"{text}{ends} of {one.n:,}"
    if not found:
        return None
    names = [seed.name for seed in seeds]
    rows = [(leaf, [cells.get(name, "–") for name in names]) for leaf, cells in found.items()]
    return {"title": f"{column.label} {column.metric}", "seeds": names, "rows": rows}


# ----------------------------------------------------------------------------------------------------------- training


def _training(made: Sequence[Made]) -> Any:
    """Loss, margin and accuracy against steps, a line for each seed; None where no log says any."""
    logs = [(one.seed, list(log_lines(one.folder / "log.jsonl"))) for one in made]
    panels = []
    for word, keys in CURVES.items():
        for key in keys:
            lines = [Curve(seed, points) for seed, lines in logs if len(points := _points(lines, key)) > 1]
            if lines:
                panels.append((f"held-out {word}" if key.startswith("eval_") else word, lines))
    if not panels:
        return None
    said = "What training logged, a line for each seed."
    return curves(said, ("optimiser step", ""), panels).inline()


def log_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Lines of a log.jsonl that are about training; a line that a kill cut short is passed over.

    A run that was interrupted logs the steps after its last checkpoint twice: the later line counts.
    """
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        of_step = isinstance(line, dict) and line.get("event") == "train" and isinstance(line.get("step"), int)
        if of_step and "train_runtime" not in line:
            found[line["step"], any(key.startswith("eval_") for key in line)] = line
    yield from (found[key] for key in sorted(found))


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[tuple[float, Value], ...]:
    known = [(float(line["step"]), line[key]) for line in lines if isinstance(line.get(key), int | float)]
    # NaN and infinity have no place on an axis.
    finite = [(step, float(value)) for step, value in known if abs(value) < float("inf")]
    every = max(1, -(-len(finite) // MOST_POINTS))
    return tuple((step, Value(value)) for step, value in finite[::every])


# ---------------------------------------------------------------------------------------------------- recipe and merge


def _recipe(made: Sequence[Made]) -> list[tuple[str, str]]:
    """What the step was told, flat; digests and code are in the pedigree. Seeds differ in nothing that stands here."""
    identity = dict(made[0].info.get("identity") or {}) if made else {}
    for gone in ("code", "model", "base", "template", "tensors", "numerics", "kind", "seed", "inputs", "base_adapter"):
        identity.pop(gone, None)
    return [(name, text) for name, value in _flat(portable(identity)) if (text := _plain(value))]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _plain(value: Any) -> str:
    if value is None or value in ([], {}, ""):
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return visible(clip(text, MOST_TEXT))


def _merge(made: Sequence[Made]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What merging did to the weights, for each seed; empty for what is no merge."""
    found = []
    for one in made:
        file = one.folder / "artifact" / "merge.json"
        if not file.is_file():
            continue
        record = read_json(file)
        try:
            total, inputs = record["diagnostics"]["total"], record["inputs"]
            facts = [("change by the merge, ‖W′ − W‖ / ‖W‖", total["result_delta_norm"])]
            facts += [
                (f"change by input {place + 1} ({_plain(given['name'])}), weight {given.get('weight')}", norm)
                for place, (given, norm) in enumerate(zip(inputs, total["delta_norm"], strict=True))
            ]
            facts += [(f"cosine of inputs {pair}", value) for pair, value in total["cosine"].items()]
            facts += [("share of entries that inputs pull both ways", total["sign_conflict"])]
            facts += [(str(key).replace("_", " "), value) for key, value in total["merger"].items()]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptionError(f"{file}: no record of a merge ({error!r}); merge again with --fresh") from None
        known = [(visible(name), number(value)) for name, value in facts if isinstance(value, int | float)]
        found.append((one.seed, known))
    return found


# ------------------------------------------------------------------------------------------------- costs and pedigree


def _costs(made: Sequence[Made]) -> list[tuple[str, list[tuple[str, str]]]]:
    found = []
    for one in made:
        told = {f"seconds, {name}": value for name, value in (one.status.get("seconds") or {}).items()}
        told |= {name.replace("_", " "): value for name, value in _flat(one.status.get("costs") or {})}
        facts = [(name, f"{value:,}" if _is_number(value) else _plain(value)) for name, value in told.items()]
        found.append((one.seed, [(name, text) for name, text in facts if text]))
    return [(seed, facts) for seed, facts in found if facts]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _step(one: Made) -> list[tuple[str, str]]:
    file = one.folder / "provenance.json"
    source = portable(read_json(file)) if file.is_file() else {}
    versions = {"harness": source.get("harness"), **(source.get("libraries") or {})}
    more = {name: value for name, value in source.items() if name in ("engine", "machine", "numerics")}
    found = [
        ("step", str(one.info.get("id"))),
        ("folder", one.folder.name),
        ("artefact", f"{one.status.get('artifact')}, SHA-256 {one.status.get('digest')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        *((name, _plain(value)) for name, value in more.items()),
        *(("note", str(note)) for note in one.status.get("notes") or ()),
    ]
    return [(name, visible(portable(text))) for name, text in found]
