"""Judges held against people: agreement, kappa and what was confused, on the samples of a run.

Labels are a CSV file with a header, or JSON lines, or a JSON list of objects: ``id`` (a sample's), ``label`` (1,
harmful, unsafe, yes, true; or 0, harmless, safe, no, false), and ``task`` and ``arm`` where the id alone does not tell
which answer was read. A label may be empty: its person did not decide, and the sample is left out and counted.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import UserError, unknown
from harness.core.text import visible
from harness.judges.figures import Figure, bootstrapped, kappa, share
from harness.report.read import open_run

YES = frozenset({"1", "1.0", "true", "yes", "y", "harmful", "unsafe", "b", "[[b]]"})
NO = frozenset({"0", "0.0", "false", "no", "n", "harmless", "unharmful", "safe", "a", "[[a]]"})


@dataclass(frozen=True)
class Labels:
    """What people said: (arm or None, task or None, sample id) -> harmful; and how many said nothing."""

    harmful: Mapping[tuple[str | None, str | None, str], bool]
    undecided: int = 0


@dataclass(frozen=True)
class Agreement:
    """One judge against people on one task. Counts: of people's label, then of the judge's verdict."""

    arm: str
    task: str
    scorer: str
    judge: str
    n: int
    """Samples with both a label and a verdict."""
    n_unscored: int
    """Labelled samples that the judge gave no verdict on."""
    n_unlabelled: int
    """Samples with a verdict and without a label."""
    agreement: Figure
    """Share of these on which both say the same; Wilson's interval."""
    kappa: Figure
    """Cohen's, of these; None where judge and people say one and the same throughout. Bootstrap over samples."""
    both_harmful: int
    judge_alone: int
    """Harmful for the judge, harmless for people."""
    people_alone: int
    both_harmless: int

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for people."""
        name = visible(f"{self.task}, {self.arm}, judge {self.judge} ({self.scorer})")
        if self.agreement.value is None:
            return [f"{name}: gave no verdict on any of the {self.n_unscored} labelled samples"]
        shown = f"{self.agreement.value:.1%} of {self.n} ({self.agreement.low:.1%} to {self.agreement.high:.1%})"
        found = [f"{name}: agrees with people on {shown}"]
        if self.kappa.value is None:
            found.append("  Cohen's kappa: not defined, as one label or verdict explains it all")
        else:
            span = "" if self.kappa.low is None else f" ({self.kappa.low:.3f} to {self.kappa.high:.3f})"
            found.append(f"  Cohen's kappa {self.kappa.value:.3f}{span}")
        found.append(
            f"  harmful for both {self.both_harmful}, for the judge alone {self.judge_alone}, "
            f"for people alone {self.people_alone}, harmless for both {self.both_harmless}"
        )
        if self.n_unscored or self.n_unlabelled:
            found.append(f"  left out: {self.n_unscored} without a verdict, {self.n_unlabelled} without a label")
        return found


def agreement(
    run: Path, labels: Path, *, task: str | None = None, scorer: str | None = None
) -> tuple[list[Agreement], list[str]]:
    """Every judge of a run (one that gives each sample a verdict) against people.

    Args:
        run: a folder that `harness eval` wrote.
        labels: the file of people's labels.
        task: this task alone.
        scorer: this scorer alone.

    Returns:
        One for each judge, task and arm; and notes on what of the labels was not used.

    Raises:
        UserError: no such run, no readable labels, a task or scorer that the run has not, no label fits,
            or it cannot be told which answer a label is about.
    """
    said = read_labels(labels)
    steps = list(_judged(run))
    if not steps:
        raise UserError(
            str(run), "no step of this run holds verdicts", "Evaluate a task with a judge, such as dangerous_qa."
        )
    for option, wanted, known in (
        ("--task", task, [one.task for one in steps]),
        ("--scorer", scorer, [one.scorer for one in steps]),
    ):
        if wanted is not None and wanted not in known:
            raise unknown(option, option[2:], wanted, known, f"harness report {run}")
    chosen = [one for one in steps if task in (None, one.task) and scorer in (None, one.scorer)]
    answers = {(one.arm, one.task): one.verdicts for one in chosen}
    used = set()
    by_answer: dict[tuple[str, str], dict[str, bool]] = {place: {} for place in answers}
    for key, harmful in said.harmful.items():
        arm, of, sample = key
        fits = [place for place in answers if arm in (None, place[0]) and of in (None, place[1])]
        fits = [place for place in fits if sample in answers[place]]
        if len(fits) > 1:
            listed = "; ".join(f"arm {one}, task {other}" for one, other in fits[:4])
            fix = "Add the columns task and arm, or choose with --task."
            raise UserError(str(labels), f"{visible(sample)!r} is a sample of several answers: {listed}", fix)
        if fits:
            by_answer[fits[0]][sample] = harmful
            used.add(key)
    found = [_compare(one, asked) for one in chosen if (asked := by_answer[one.arm, one.task])]
    if not used:
        ids = ", ".join(repr(sample) for sample in list(chosen[0].verdicts)[:3])
        raise UserError(str(labels), "none of its ids is a sample of this run", f"Ids of the run are such as {ids}.")
    notes = [f"{len(said.harmful) - len(used)} labels are of no sample here"] if len(used) < len(said.harmful) else []
    notes += [f"{said.undecided} rows of {labels.name} have no label"] if said.undecided else []
    return found, notes


@dataclass(frozen=True)
class _Verdicts:
    arm: str
    task: str
    scorer: str
    judge: str
    verdicts: Mapping[str, bool | None]


def _judged(run: Path) -> Iterator[_Verdicts]:
    """Every judge of every step that holds verdicts."""
    for result in open_run(run).tasks:
        for step in result.scores:
            judges = dict.fromkeys(j for row in step.samples.values() for j in _said(row)) if step.done else {}
            for judge in judges:
                verdicts = {sample: _said(row).get(judge) for sample, row in step.samples.items()}
                arm = str(result.info.get("arm") or step.info.get("arm", "model"))
                yield _Verdicts(arm, result.name, str(step.info.get("scorer", "")), judge, verdicts)


def _said(row: Mapping[str, Any]) -> Mapping[str, bool | None]:
    said = row.get("detail", {}).get("verdicts")
    return said if isinstance(said, dict) else {}


def _compare(one: _Verdicts, labels: Mapping[str, bool]) -> Agreement:
    pairs = [(labels[sample], verdict) for sample, verdict in one.verdicts.items() if sample in labels]
    known = [(people, judge) for people, judge in pairs if judge is not None]
    counts = Counter(known)
    unlabelled = sum(verdict is not None and sample not in labels for sample, verdict in one.verdicts.items())
    return Agreement(
        arm=one.arm,
        task=one.task,
        scorer=one.scorer,
        judge=one.judge,
        n=len(known),
        n_unscored=len(pairs) - len(known),
        n_unlabelled=unlabelled,
        agreement=share([people == judge for people, judge in known]),
        kappa=bootstrapped(known, kappa),
        both_harmful=counts[True, True],
        judge_alone=counts[False, True],
        people_alone=counts[True, False],
        both_harmless=counts[False, False],
    )


# ------------------------------------------------------------------------------------------------------------- labels


def read_labels(path: Path) -> Labels:
    """People's labels.

    Raises:
        UserError: the file cannot be read, lacks a column, holds a label that is neither, or labels a sample twice.
    """
    harmful: dict[tuple[str | None, str | None, str], bool] = {}
    undecided = 0
    for place, row in _rows(path):
        missing = [key for key in ("id", "label") if key not in row]
        if missing:
            there = ", ".join(map(str, row)) or "none"
            raise UserError(
                place, f"no column {missing[0]!r}", f"A row has id and label, and may have task and arm. Here: {there}."
            )
        text = "" if row["label"] is None else str(row["label"]).strip().lower()
        if not text:
            undecided += 1
            continue
        if text not in YES | NO:
            fix = "Write harmful (1, unsafe, yes, true) or harmless (0, safe, no, false), or leave it empty."
            raise UserError(f"{place}, label", f"{visible(str(row['label']))!r} is neither harmful nor harmless", fix)
        arm, task = (str(row.get(column) or "").strip() or None for column in ("arm", "task"))
        key = (arm, task, str(row["id"]).strip())
        if key in harmful:
            raise UserError(f"{place}, id", f"{visible(key[2])!r} is labelled twice", "Keep one label for each sample.")
        harmful[key] = text in YES
    if not harmful:
        raise UserError(str(path), "holds no label", "Give rows with id and label.")
    return Labels(harmful, undecided)


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--human-labels {path}", f"cannot be read: {error}", "Give CSV, JSON or JSON lines.") from None
    if text.lstrip()[:1] not in ("{", "["):
        reader = csv.DictReader(io.StringIO(text))
        for row in reader:
            yield f"{path}:{reader.line_num}", {key: value for key, value in row.items() if key is not None}
        return
    if text.lstrip().startswith("["):
        values = _parsed(text, str(path))
        found = [(f"{path}, row {number}", value) for number, value in enumerate(values, 1)]
    else:
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        found = [(f"{path}:{number}", _parsed(line, f"{path}:{number}")) for number, line in lines]
    for place, value in found:
        if not isinstance(value, dict):
            raise UserError(place, f"a JSON {type(value).__name__}, not an object", "A row has id and label.")
        yield place, value


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(where, f"not JSON: {error}", "Give CSV, a JSON list, or one object in each line.") from None
