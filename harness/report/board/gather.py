"""From run folders to arms with scores: which numbers belong to one arm, and which were asked in the same way.

An arm is known by what it is made of, so that the same arm in two runs is one. A column is known by how it was asked
and scored: another prompt, template, version, revision, limit or scorer is another column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import CorruptionError
from harness.core.records import Metric, Row, digest_of
from harness.core.text import clip, portable, task_label, visible
from harness.report.board.judged import Panel, judged_of
from harness.report.board.model import Source
from harness.report.external.open import open_log, source
from harness.report.pairing import base_of
from harness.report.read import RunResult, StepFolders, StepResult, TaskResult, read_step
from harness.report.study import INDEX, open_runs
from harness.steps.files import read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STALE = "stale: it scored other answers than those that are there now; run the same command again"
_ARM = ("model", "adapter", "control", "engine", "dtype", "folded")
_ASKED = ("task", "variant", "limit", "data", "seed")
EXTERNAL = "external"
"""Kind of an arm that another program evaluated."""
_RECIPE = (
    "method",
    "adapter",
    "model",
    "base",
    "dtype",
    "template",
    "recipe",
    "options",
    "data",
    "weights",
    "processes",
)
_RECIPE_MORE = ("checkpoints", "form", "rank", "code", "stage")


@dataclass(frozen=True)
class Asked:
    """How one number was asked and scored: what a column is known by, its template apart."""

    digest: str
    template: str | None
    metric: str


@dataclass
class Scored:
    """The scores of one arm, trained once, in one column."""

    row: Row
    metric: Metric
    task: TaskResult
    step: StepResult
    values: NDArray[np.float64]
    """In the order of the column's samples."""


@dataclass
class Samples:
    """The samples of a column, in one order, and how they hang together."""

    ids: list[str]
    clusters: list[str] | None
    strata: list[str] | None


@dataclass(frozen=True)
class Made:
    """The step that made an arm."""

    id: str
    folder: str
    recipe: Mapping[str, Any]
    """What decides its weights but for its seed and the very arms that it builds on."""
    digest: str
    """Of the recipe."""
    seconds: dict[str, float]
    counts: dict[str, int]


@dataclass
class ArmRun:
    """One arm, trained once."""

    key: str
    name: str
    base: str | None
    base_name: str | None
    kind: str
    factors: dict[str, Any]
    parents: tuple[str, ...] = ()
    made: Made | None = None
    sources: list[int] = field(default_factory=list)
    scores: dict[Asked, Scored] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


@dataclass
class Gathered:
    """Everything that a board is made from."""

    sources: list[Source] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)
    """Run folders, in the order of the sources."""
    arms: dict[str, ArmRun] = field(default_factory=dict)
    """By what an arm is made of, in the order in which they were met: every base before its arms."""
    samples: dict[str, Samples] = field(default_factory=dict)
    """By the digest of how they were asked and scored."""
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same digest -> what it is of, to say what two columns differ in."""
    versions: dict[int, dict[str, list[str]]] = field(default_factory=dict)
    """Place of a source -> versions of harness and libraries."""
    panels: dict[str, Panel] = field(default_factory=dict)
    """Judges and wordings of a task that names several, by the digest of how it was asked."""
    claims: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gather(roots: Sequence[Path]) -> Gathered:
    """Read run folders and studies.

    Raises:
        UserError: a folder is no run.
        CorruptionError: a record is damaged, or two records of one number differ.
    """
    found = Gathered()
    for root in dict.fromkeys(root.resolve() for root in roots):
        log = open_log(root)
        runs = [log] if log is not None else list(open_runs(root).values())
        plan = read_json(root / "plan.json") if log is None else log.plan
        study = _Study(root, plan) if log is None and "study" in plan else None
        if study is not None:
            found.claims += [one for one in plan.get("claims") or () if one not in found.claims]
        found.roots.append(root)
        found.sources.append(_source(runs[0], plan))
        for run in runs:
            _add_run(found, run, study)
        versions = {name: tuple(some) for name, some in found.versions.get(len(found.sources) - 1, {}).items() if some}
        found.sources[-1] = found.sources[-1].model_copy(update={"versions": versions})
    return found


def _source(run: RunResult, plan: Mapping[str, Any]) -> Source:
    study = plan.get("study")
    engine = str((run.plan.get("engine") or {}).get("name", ""))
    name = visible(portable(str(study))) if study is not None else run.name
    return Source(name=name, study=study, summary=visible(portable(str(plan.get("summary") or ""))), engine=engine)


class _Study:
    """What a study's plan says of its arms, and the recipes of those that were made."""

    def __init__(self, root: Path, plan: Mapping[str, Any]) -> None:
        index = read_json(root / INDEX) if (root / INDEX).is_file() else {}
        self.ids: Mapping[str, str] = index.get("ids", {})
        self.folders = StepFolders(root)
        self.arms: dict[str, Mapping[str, Any]] = {str(arm["name"]): arm for arm in plan.get("arms", ())}
        self._made: dict[str, Made | None] = {}

    def made(self, arm: Mapping[str, Any]) -> Made | None:
        """How an arm was made; None: it was not, or its record is not there."""
        key = arm.get("made_by")
        if key is None:
            return None
        step_id = str(self.ids.get(key, key))
        if step_id not in self._made:
            found = [read_step(self.folders, kind, step_id) for kind in ("align", "merge")]
            self._made[step_id] = next((_made(one) for one in found if one.folder is not None), None)
        return self._made[step_id]


def _made(step: StepResult) -> Made:
    identity = step.identity
    recipe = {name: identity[name] for name in _RECIPE if name in identity}
    recipe |= {"from": identity.get("from") is not None, "inputs": len(identity.get("inputs") or ())}
    record, folder = step.record, step.folder
    seconds, counts = (dict(record.seconds), dict(record.counts)) if record is not None else ({}, {})
    return Made(step.id, folder.name if folder is not None else "", recipe, digest_of(recipe), seconds, counts)


def _add_run(found: Gathered, run: RunResult, study: _Study | None) -> None:
    number = len(found.sources) - 1
    base, others = base_of(run)
    base_key = _arm_key(base, study) if base is not None else None
    for one in ([base] if base is not None else []) + others:
        key = _arm_key(one, study)
        identity = _identity(one)
        # Of a run without its base the base is that of its adapters, if another run has it.
        implied = digest_of({**identity, "adapter": None, "control": None, "folded": None}) if identity else None
        of_base = None if one is base else base_key or (implied if implied != key else None)
        name = one.label or _model_name(one) if (program := source(one)) is None else f"{one.name} ({program})"
        arm = found.arms.get(key)
        if arm is not None and number in arm.sources and arm.name != name:
            # Two arms of one run that came out alike are still two; which of them a further run has, its name says.
            found.notes.append(visible(portable(f"{arm.name} and {name} are the same, byte for byte")))
            key = digest_of([key, name])
            arm = found.arms.get(key)
        if arm is None:
            arm = found.arms[key] = ArmRun(key, name, of_base, _model_name(run), "arm", {})
        arm.base = arm.base or of_base
        if number not in arm.sources:
            arm.sources.append(number)
        _describe(arm, one, study, one is base)
        _add_scores(found, arm, one)
    for name, why in run.plan.get("left_out", {}).items():
        found.notes.append(visible(portable(f"{name}: {why}")))


def _describe(arm: ArmRun, run: RunResult, study: _Study | None, is_base: bool) -> None:
    """A study says more of an arm than an evaluation; the first that does is believed."""
    if (program := source(run)) is not None:
        arm.kind, arm.name, arm.factors = EXTERNAL, f"{run.name} ({program})", {"made by": program}
        return
    told = study.arms.get(run.label or _model_name(run)) if study is not None else None
    if told is not None and (not arm.factors or arm.kind == "arm"):
        assert study is not None
        arm.factors, arm.kind = {k: v for k, v in told["factors"].items() if v is not None}, str(told["kind"])
        arm.name, arm.base_name, arm.parents = str(told["name"]), str(told["base"]), tuple(told.get("from", ()))
        arm.made = study.made(told)
    elif not arm.factors:
        arm.kind = "base" if is_base else "arm"
        arm.factors = {"base": arm.base_name, "method": "base"} if is_base else {"base": arm.base_name}
        if run.label is not None:
            arm.factors["adapter"] = run.label


def _model_name(run: RunResult) -> str:
    model = run.plan.get("model") or {}
    return visible(portable(str(model.get("name") or model.get("ref") or run.root.name)))


def _identity(run: RunResult) -> dict[str, Any]:
    """What an arm is made of, from its answers; the template is how it was asked."""
    for task in run.tasks:
        identity = task.answers.identity if task.answers is not None else {}
        if isinstance(identity.get("model"), Mapping):
            whole = {name: identity.get(name) for name in _ARM}
            return {**whole, "model": {k: v for k, v in identity["model"].items() if k != "template"}}
    return {}


def _arm_key(run: RunResult, study: _Study | None) -> str:
    identity = _identity(run)
    if identity:
        return digest_of(identity)
    if (program := source(run)) is not None:
        # Of a log there is no more than what it says, each of which is in the ids of its steps.
        return digest_of([program, run.name, [step.id for task in run.tasks for step in task.scores]])
    # Records of no known identity, or none yet: one run's are never another's.
    return digest_of([[[task.info.get("answers"), task.info.get("scores")] for task in run.tasks], run.label])


def _add_scores(found: Gathered, arm: ArmRun, run: RunResult) -> None:
    versions = found.versions.setdefault(len(found.sources) - 1, {})
    for task in run.tasks:
        label = task_label(task.name, task.variant)
        for step in task.failed():
            why = clip(visible(portable((step.record.error if step.record else None) or "no reason recorded")), 400)
            arm.missing.append(f"{label}: failed: {why}")
        if task.unfinished():
            arm.missing.append(f"{label}: not finished")
        columns: dict[str, str | None] = {}
        for step in task.scores:
            if step.done and _is_stale(task, step):
                arm.missing.append(f"{label}: {STALE}")
            elif step.done:
                columns[step.id] = _add_step(found, arm, task, step)
        _add_panels(found, arm, task, columns)
        for step in task.steps:
            source = step.provenance if step.folder is not None else {}
            for name, version in {"harness": source.get("harness"), **source.get("libraries", {})}.items():
                known = versions.setdefault(name, [])
                if version is not None and version not in known:
                    known.append(visible(portable(str(version))))
    arm.missing = list(dict.fromkeys(arm.missing))


def _is_stale(task: TaskResult, step: StepResult) -> bool:
    """Whether a step scored other answers than those that are there now, as far as both records say."""
    now = task.answers.record.digest if task.answers is not None and task.answers.record is not None else None
    scored = step.record.made_from.get("answers") if step.record is not None else None
    return now is not None and scored is not None and now != scored


def _add_panels(found: Gathered, arm: ArmRun, task: TaskResult, columns: Mapping[str, str | None]) -> None:
    """Who was to be asked about the answers of one arm, and where its numbers are or why there are none."""
    if task.answers is None or not task.answers.done:
        return  # then no judge has anything to say, and that is told already
    for scorer, some in judged_of(task.info).items():
        panel = found.panels.setdefault(digest_of([_how(task), scorer]), Panel(task.name, scorer))
        steps = {step.id: step for step in task.scores}
        for one in some:
            name = (str(one["judge"]), one.get("wording"))
            digests = panel.columns.setdefault(name, set())
            column = columns.get(one["scores"])
            if column is not None:
                digests.add(column)
                continue
            step = steps.get(one["scores"])
            why = "not finished"
            if step is not None and step.done:
                why = STALE
            elif step is not None and step.record is not None:
                why = f"failed: {clip(visible(portable(step.record.error or 'no reason recorded')), 200)}"
            panel.missing[name, arm.key] = why


def _how(task: TaskResult) -> dict[str, Any]:
    """How a task was asked, whoever scores the answers."""
    answers = task.answers.identity if task.answers is not None else {}
    how = {name: answers.get(name) for name in _ASKED} if "task" in answers else {"limit": task.info.get("limit")}
    return how | {"name": task.name, "variant": task.variant, "version": task.info.get("version")}


def _add_step(found: Gathered, arm: ArmRun, task: TaskResult, step: StepResult) -> str | None:
    """Take in the scores of one step; the digest of how they were asked and scored, None where it has no samples."""
    import numpy as np

    rows = {row.metric: row for row in step.rows if row.leaf is None}
    samples = step.read_samples()
    ids = list(samples)
    if not ids:
        arm.missing.append(
            f"{task_label(task.name, task.variant)}: its log holds no samples, and means alone pair with nothing"
        )
        return None
    how = _how(task) | {"scorer": step.info.get("scorer"), "scorer options": step.identity.get("scorer")}
    how |= {
        "scorer code": step.identity.get("scorer_code"),
        "samples": hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest(),
    }
    if "asked" in task.info:
        # Another program's log: its ids are mere numbers, and what they stand for is known by digests alone.
        questions = task.info.get("questions") or {}
        unknown = None if questions.keys() >= set(ids) else step.id
        how |= {"program": step.info.get("scorer"), "asked": task.info["asked"], "questions unknown": unknown}
        how["questions"] = digest_of(sorted((str(key), value) for key, value in questions.items()))
    judged = {row.task for row in rows.values()}
    digest = digest_of({**how, "judged": sorted(judged)})
    known = found.samples.get(digest)
    if known is None:
        found.asked[digest] = how
        known = found.samples[digest] = Samples(ids, _labels(samples, "cluster"), _labels(samples, "leaf"))
    order = None if ids == known.ids else known.ids
    for metric in step.metrics:
        row = rows.get(metric.name)
        if row is None:
            raise CorruptionError(
                f"{step.artifact / 'scores.json'}: has no row of {metric.name}; start over with --fresh"
            )
        where = Asked(digest, row.template, metric.name)
        if (before := arm.scores.get(where)) is not None and before.step.id == step.id:
            if before.row.mean != row.mean:
                what = f"two runs hold the step {step.id[:12]} with other numbers ({before.row.mean} and {row.mean})"
                raise CorruptionError(f"{step.folder}: {what}; leave one of the runs out")
            continue
        if before is not None:
            found.notes.append(f"{arm.name}, {row.task}: answered twice; the first run's numbers are shown")
            continue
        by_id = {key: one["values"].get(metric.name) for key, one in samples.items()}
        scores = [by_id[key] for key in order] if order is not None else list(by_id.values())
        values = np.array([np.nan if one is None else one for one in scores], dtype=np.float64)
        if not np.isfinite(values[~np.isnan(values)]).all() or any(one != one for one in scores if one is not None):
            raise CorruptionError(
                f"{step.artifact}: a score of {metric.name} is no finite number; start over with --fresh"
            )
        _check_mean(row, metric, values, step)
        arm.scores[where] = Scored(row, metric, task, step, values)
    return digest


def _check_mean(row: Row, metric: Metric, values: NDArray[np.float64], step: StepResult) -> None:
    """The row must be of these samples: a mean of one and a difference of the other would both look right."""
    import numpy as np

    if metric.aggregate != "mean" or row.mean is None or row.withheld is not None:
        return
    scored = values[~np.isnan(values)]
    mean = float(scored.mean()) if len(scored) else None
    if mean is None or len(scored) != row.n or abs(mean - row.mean) > 1e-9 * max(1.0, float(np.abs(scored).max())):
        what = f"the mean of {metric.name} is {row.mean} of {row.n}, its samples' {mean} of {len(scored)}"
        raise CorruptionError(f"{step.artifact / 'scores.json'}: {what}; start over with --fresh")


def _labels(samples: Mapping[str, Mapping[str, Any]], name: str) -> list[str] | None:
    """The label of each sample; one without stands for itself. None: none has any."""
    if all(not row.get(name) for row in samples.values()):
        return None
    if name == "leaf":
        return [str(row.get(name) or "") for row in samples.values()]
    return [f"cluster {row[name]}" if row.get(name) else f"sample {key}" for key, row in samples.items()]
