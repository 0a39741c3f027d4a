"""Samples side by side: what a page needs to show every sample of any two arms, in side files.

Scores and flags of a task are one side file, so that filters work without a text; questions and answers come in parts,
loaded when a sample is opened. Questions that arms share are written once. Nothing is compared here that was not asked
and scored alike without the page saying so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.records import digest_of
from harness.core.text import clip, portable, task_label, visible
from harness.report.board.judged import label_of
from harness.report.pages.page import pieces
from harness.report.pages.side_files import SideFiles
from harness.report.read import StepResult, TaskResult, Texts

MOST_CHARACTERS = 20_000
"""Longest prompt or answer that a page shows; a longer one says how much was left out."""
MOST_CHOICES = 26
CUT, HIT_LIMIT = 1, 2
"""Flags of a sample: its prompt was cut, its answer ended because the token budget was spent."""


@dataclass(frozen=True)
class _Part:
    """One task of one arm."""

    arm: int
    place: int
    """Where it stands among the tasks of its arm."""
    task: TaskResult
    steps: tuple[StepResult, ...]

    @property
    def questions(self) -> Path:
        """The file of its questions, which other arms may share."""
        return self.steps[0].requests_file


def gather(arms: Sequence[tuple[str, Sequence[TaskResult]]], files: SideFiles) -> list[dict[str, Any]]:
    """Write the samples of some arms; returns them as a page's script wants them, in the order given.

    Raises:
        CorruptionError: a record is damaged.
    """
    parts = list(_parts(arms))
    tasks: dict[tuple[int, int], dict[str, Any]] = {}
    source, asked = None, dict[str, Texts]()
    for part in sorted(parts, key=lambda part: (str(part.questions), part.arm, part.place)):
        if source != part.questions:  # arms that were asked the same come one after another
            source, asked = part.questions, part.steps[0].asked()
        tasks[part.arm, part.place] = _task(part, asked, files)
    return [
        {"name": visible(name), "tasks": [tasks[part.arm, part.place] for part in parts if part.arm == index]}
        for index, (name, _) in enumerate(arms)
    ]


def _parts(arms: Sequence[tuple[str, Sequence[TaskResult]]]) -> Iterator[_Part]:
    for index, (_, tasks) in enumerate(arms):
        for place, task in enumerate(tasks):
            steps = tuple(step for step in task.scores if step.done and step.metrics)
            if steps:
                yield _Part(index, place, task, steps)


def _judged(task: TaskResult, step: StepResult) -> str:
    """Who judged, of a task that several judge."""
    told = next((one for one in task.info.get("judged") or () if one["scores"] == step.id), None)
    return "" if told is None else f" ({label_of((str(told['judge']), told['wording']))})"


def _task(part: _Part, asked: Mapping[str, Texts], files: SideFiles) -> dict[str, Any]:
    task, steps = part.task, part.steps
    ids = list(steps[0].samples)
    rows = [[step.samples.get(name, {}) for step in steps] for name in ids]
    metrics, values = [], []
    for place, step in enumerate(steps):
        for metric in step.metrics:
            metrics.append(
                {
                    "name": visible(metric.name + _judged(task, step)),
                    "unit": visible(metric.unit),
                    "better": {True: 1, False: -1, None: 0}[metric.higher_is_better],
                    "primary": metric.primary,
                    # Who wrote the numbers: equal texts are needed for two columns to measure the same.
                    "scored": digest_of([step.info.get("scorer"), step.identity.get("scorer")])[:12],
                }
            )
            values.append([each[place].get("values", {}).get(metric.name) for each in rows])
    texts = steps[0].texts(ids, asked)
    return {
        "task": task_label(task.name, task.variant),
        "name": visible(task.name),
        "asked": digest_of([task.variant, task.template, task.info.get("version")])[:12],
        "metrics": metrics,
        "ids": files.add(_ids(ids, rows)),
        "values": files.add(_values(values, rows)),
        "prompts": files.add_chunks(_question(texts[name]) for name in ids) if len(texts) == len(ids) else [],
        "answers": files.add_chunks(_answers(ids, texts, rows)),
    }


def _ids(ids: Sequence[str], rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    leaves = [str(each[0].get("leaf") or "") for each in rows]
    names = sorted(set(leaves))
    at = {name: place for place, name in enumerate(names)}
    shown = [visible(name) for name in ids]
    return {"ids": shown, "leaves": [visible(name) for name in names], "leaf": [at[leaf] for leaf in leaves]}


def _values(values: list[list[float | None]], rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    reasons = {
        str(index): [visible(clip(str(portable(one["reason"])), 300)) for one in each if one.get("reason")]
        for index, each in enumerate(rows)
        if any(one.get("reason") for one in each)
    }
    flags = [
        CUT * any(one.get("cut") for one in each) | HIT_LIMIT * any(one.get("hit_limit") for one in each)
        for each in rows
    ]
    return {"values": values, "flags": flags, "reasons": reasons}


def _question(texts: Texts) -> list[Any]:
    # The question of a few-shot prompt stands at its end.
    return [_text(texts.prompt, tail=0.7), None if texts.target is None else _text(texts.target)]


def _answers(
    ids: Iterable[str], texts: Mapping[str, Texts], rows: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for name, each in zip(ids, rows, strict=True):
        found: dict[str, Any] = {}
        text = texts.get(name)
        if text is not None:
            if text.generated is not None:
                found["text"] = _text(text.generated)
            choices = text.choices
            if choices:
                found["choices"] = [[_text(one), logprob, best] for one, logprob, best in choices[:MOST_CHOICES]]
                found["more"] = max(0, len(choices) - MOST_CHOICES)
            errors = [_text(output.error) for output in text.outputs if output.error is not None]
            if errors:
                found["errors"] = errors[:3]
            detail = [kept for one in each if (kept := _without_empty(one.get("detail") or {}))]
            if detail:
                found["detail"] = [
                    _text(json.dumps(one, ensure_ascii=False, sort_keys=True, indent=1)) for one in detail
                ]
        yield found


def _text(text: str, *, tail: float = 0.0) -> str | list[str]:
    return pieces(clip(text, MOST_CHARACTERS, tail=tail))


def _without_empty(detail: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in detail.items() if value not in (None, "", [], {})}
