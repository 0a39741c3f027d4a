"""The card that an adapter or a model is published with: its own, with base, data, licence and what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from harness.core.errors import CorruptionError, UserError
from harness.core.records import Row
from harness.core.text import number, task_label, visible
from harness.models.artifact import read_artifact
from harness.report.read import TaskResult
from harness.report.study import open_runs

NOT_MEASURED = "Not measured here: helpfulness and harmlessness."
"""Begins the last line of every card that a step writes."""


@dataclass(frozen=True)
class Results:
    """What one run measured of an arm, and what it left out."""

    rows: tuple[tuple[Row, TaskResult], ...]
    """Primary metrics of whole tasks, with a mean."""
    withheld: tuple[Row, ...] = field(default=())


def results_of(folder: Path, run: Path) -> Results:
    """What a run measured of the adapter or model in a folder, found by its digest, never by its name.

    Raises:
        UserError: the run has no answers of it.
        CorruptionError: a record is damaged.
    """
    artifact = read_artifact(folder)
    rows: list[tuple[Row, TaskResult]] = []
    withheld: list[Row] = []
    for base in open_runs(run).values():
        for task in (one for one in base.tasks if _is_of(one, artifact.kind, artifact.digest)):
            for row in (row for step in task.scores if step.done for row in step.rows):
                if row.leaf is not None or not row.primary:
                    continue
                if row.mean is None or row.withheld is not None:
                    withheld.append(row)
                else:
                    rows.append((row, task))
    if not rows and not withheld:
        what = f"has no scores of this {artifact.kind} (digest {artifact.digest[:12]})"
        raise UserError(f"--results {run}", what, "Evaluate it: `harness eval`, or as an arm of a study.")
    return Results(tuple(rows), tuple(withheld))


def _is_of(task: TaskResult, kind: str, digest: str) -> bool:
    made = task.answers.info.get("made_from", {}) if task.answers is not None else {}
    if kind == "adapter":
        return made.get("adapter") == digest
    return "adapter" not in made and made.get("model") == digest


def published_card(
    folder: Path,
    *,
    base_model: str,
    datasets: Sequence[str],
    licence: str | None,
    results: Results | None,
    relation: str = "adapter",
    unknown: Sequence[str] = (),
) -> str:
    """README.md for the hub: the folder's own card under metadata that the hub reads (``model-index`` included).

    Args:
        folder: of the adapter or model.
        base_model: hub id of the base.
        datasets: hub ids of what it was trained on.
        licence: of what is published; None: nothing is said.
        results: of :func:`results_of`.
        relation: what it is to its base, in the hub's words: adapter, merge, finetune.
        unknown: names of what it was made from whose data no record here tells.

    Raises:
        CorruptionError: the folder's card is none, or what is made of it is none that the hub takes.
    """
    try:
        card = ModelCard.load(folder / "README.md")
    except (OSError, ValueError, YAMLError) as error:
        raise CorruptionError(f"{folder / 'README.md'}: no model card ({error}); make the folder again") from None
    own = card.data.to_dict()
    data = ModelCardData(
        base_model=base_model,
        datasets=list(datasets) or None,
        license=licence,
        base_model_relation=relation,
        library_name=own.get("library_name"),
        tags=own.get("tags"),
        model_name=folder.name if results is None or not results.rows else _title(card.text),
        eval_results=[_result(row, task) for row, task in results.rows] if results is not None else None,
    )
    lines = card.text.rstrip().splitlines()
    if results is not None:
        if lines and lines[-1].startswith(NOT_MEASURED):
            lines.pop()
        while lines and not lines[-1]:
            lines.pop()
        lines += ["", *_table(results)]
    if unknown:
        lines += ["", f"Not on record here: what {visible(', '.join(unknown))} was trained on."]
    made = f"---\n{data.to_yaml()}\n---\n" + "\n".join(lines).rstrip() + "\n"
    try:
        # As the hub's own library reads it; what it cannot read it would drop without a word.
        again = ModelCard(made).data
    except (ValueError, YAMLError) as error:
        what = f"its metadata is none ({error})"
        raise CorruptionError(f"{folder / 'README.md'}: {what}; make the folder again") from None
    if again.to_dict() != data.to_dict():  # type: ignore[no-untyped-call]
        raise CorruptionError(f"{folder / 'README.md'}: its metadata is read back as other; make the folder again")
    return made


def _title(text: str) -> str:
    return next((line[2:] for line in text.splitlines() if line.startswith("# ")), "model")


def _result(row: Row, task: TaskResult) -> EvalResult:
    source = str(task.info.get("source") or row.task)
    on_hub = re.match(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?=$|[\s,;])", source)
    return EvalResult(
        task_type="text-generation",
        dataset_type=on_hub[0] if on_hub else row.task.split("@")[0].removeprefix("lm_eval:"),
        dataset_name=f"{task_label(row.task, row.variant)}: {source}",
        metric_type=row.metric,
        metric_value=row.mean,
        metric_name=f"{row.metric} ({_how_sure(row)})",
    )


def _how_sure(row: Row) -> str:
    interval = f"95 % interval {number(row.ci95[0])} to {number(row.ci95[1])}, " if row.ci95 is not None else ""
    unscored = f", {row.n_unscored:,} unscored" if row.n_unscored else ""
    return f"{interval}n = {row.n:,}{unscored}"


def _table(results: Results) -> list[str]:
    lines = ["## Measured", "", "| task | metric | mean | 95 % interval | n | unscored | truncated | step |"]
    lines.append("| --- | --- | ---: | --- | ---: | ---: | ---: | --- |")
    for row, _ in results.rows:
        interval = f"[{number(row.ci95[0])}, {number(row.ci95[1])}]" if row.ci95 is not None else "–"
        arrow = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
        cells = (task_label(row.task, row.variant), row.metric + arrow, number(row.mean or 0.0), interval)
        counts = (f"{row.n:,}", f"{row.n_unscored:,}", f"{row.n_truncated:,}", f"`{row.step[:12]}`")
        lines.append("| " + " | ".join(visible(cell).replace("|", "\\|") for cell in (*cells, *counts)) + " |")
    return lines + [f"* {visible(row.task)}, {row.metric}: withheld, {row.withheld}" for row in results.withheld]
