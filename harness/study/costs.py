"""What a study will take: from records of steps like its own, else from the size of its models. No torch.

Two steps are alike where all that decides what they take is equal: not their seeds, nor the weights themselves, but the
shape of the model, the recipe, the task and its limit, the engine.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core.costs import Costs
from harness.core.errors import CorruptionError, UserError
from harness.core.records import StepRecord, digest_of
from harness.steps.files import read_json
from harness.steps.folder import STATUS, STEP
from harness.study.card import GIB, UTILISATION, Card, is_like
from harness.study.estimate import Estimate, Sized, sized
from harness.study.plan import StudyPlan
from harness.study.status import StepState
from harness.study.turns import peak_of_merged

Key = tuple[Any, ...]
HOUR = 3600.0


@dataclass
class Records:
    """Costs of steps that have ended well, by what they are like."""

    found: dict[Key, list[Costs]] = field(default_factory=dict)
    _digest: _Digests = field(default_factory=lambda: _Digests())

    def keys(self, kind: str, identity: Mapping[str, Any], factors: Mapping[str, Any], limit: Any) -> tuple[Key, ...]:
        """What a step is like, nearest first."""
        return tuple(likeness(kind, identity, factors, limit, self._digest))

    def add(self, kind: str, identity: Mapping[str, Any], factors: Mapping[str, Any], limit: Any, costs: Costs) -> None:
        """Take note of one; of answers that an earlier run gave it says nothing."""
        if costs.reused and not costs.earlier_seconds:
            return
        for key in self.keys(kind, identity, factors, limit):
            self.found.setdefault(key, []).append(costs)

    def like(self, keys: Iterable[Key], card: Card | None) -> list[Costs]:
        """Those like a step, in the nearest sense in which there are any; on one kind of device."""
        for key in keys:
            some = self.found.get(key, [])
            if card is not None:
                # What needs no GPU takes the same beside any.
                some = [one for one in some if one.device is None or is_like(card, one.device)]
            if some:
                often = Counter(one.device for one in some).most_common(1)[0][0]
                return [one for one in some if one.device == often]
        return []


class _Digests:
    """Digests of parts of identities that many steps of a plan share as objects."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}

    def __call__(self, part: Any) -> str:
        # The part is kept, so that no other object can take its place.
        if id(part) not in self._known:
            self._known[id(part)] = part, digest_of(part)
        return self._known[id(part)][1]


def likeness(
    kind: str, identity: Mapping[str, Any], factors: Mapping[str, Any], limit: Any, digest: Callable[[Any], str]
) -> Iterator[Key]:
    """What a step is like, nearest first; a kind that is not known here is like nothing.

    Args:
        kind: of step.
        identity: of the step, planned or recorded.
        factors: of the step.
        limit: samples per leaf task of the answers that are scored.
        digest: of a part.
    """
    if kind == "align":
        adapter = {key: value for key, value in identity["adapter"].items() if key != "dropout"}
        recipe = {key: identity["recipe"].get(key) for key in _DECIDES}
        how = digest_of([identity["method"], adapter, recipe, identity["from"] is not None])
        shape = identity["model"]["config"], identity["dtype"], how
        yield kind, *shape, str(factors.get("data")), factors.get("samples")
        yield kind, *shape
    elif kind == "answers":
        task = identity["task"]["name"], identity["variant"], identity["limit"]
        asked = digest(identity["engine"]), identity["dtype"], identity["model"]["config"]
        yield kind, *task, *asked, identity["adapter"] is not None
        yield kind, *task, *asked
    elif kind == "scores":
        yield kind, factors["task"], factors["variant"], factors["scorer"], limit, digest(identity["scorer"])
    elif kind == "merge":
        inputs = factors.get("inputs") or ""
        count = len(inputs) if isinstance(inputs, list) else inputs.count("+") + 1
        yield kind, identity["method"], identity["base"]["config"], identity["form"], count
        yield kind, identity["method"], identity["base"]["config"], identity["form"]
    elif kind == "prepare":
        reference = {key: value for key, value in (identity["reference"] or {}).items() if key != "from"}
        yield kind, str(factors.get("data")), factors.get("samples"), digest_of(reference)


_DECIDES = ("steps", "batch_size", "max_length", "gradient_checkpointing", "eval_rows", "eval_every")
"""Keys of a recipe that decide how long training takes."""


def records_of(run: Path) -> Records:
    """What the steps of a run folder took.

    Raises:
        UserError: the folder holds no steps.
    """
    found, pairs = Records(), []
    for file in sorted(run.glob(f"steps/*/{STATUS}")):
        try:
            record, step = StepRecord.model_validate(read_json(file)), read_json(file.with_name(STEP))
            pairs.append((record, step["identity"], step["factors"], step["parents"]))
        except (OSError, CorruptionError, ValueError, KeyError, TypeError):
            continue  # what is damaged says nothing
    if not pairs:
        fix = "Give a run folder of `harness study run` or `harness eval`."
        raise UserError(f"--costs-from {run}", "holds no records of steps", fix)
    limits = {record.id: identity.get("limit") for record, identity, _, _ in pairs if record.kind == "answers"}
    for record, identity, factors, parents in pairs:
        if record.status == "done" and record.costs is not None:
            limit = next((limits[one] for one in parents if one in limits), None)
            try:
                found.add(record.kind, identity, factors, limit, record.costs)
            except (KeyError, TypeError, AttributeError):
                continue  # of another version
    return found


@dataclass
class Line:
    """Steps of a kind on one base, and what those of them take that are to do."""

    kind: str
    base: str
    steps: int = 0
    done: int = 0
    shared: int = 0
    """How often another arm needs a step that is there already."""
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    device_bytes: int = 0
    rss_bytes: int = 0
    disk_bytes: int = 0
    usd: float = 0.0
    calls: int = 0
    """Of judges, each of which is paid for."""
    sources: Counter[str] = field(default_factory=Counter)
    """From what the time of how many steps is known: records, size, nothing."""
    devices: set[str] = field(default_factory=set)
    """Of the records."""
    assumed: dict[str, None] = field(default_factory=dict)
    uncounted: int = 0
    """Steps that call a judge nobody knows how often."""
    unpriced: int = 0
    """Steps that call a judge whose prices nobody states."""

    def to_json(self) -> dict[str, Any]:
        """Figures and what they rest on; a figure that nothing is known of is null."""
        todo = self.steps - self.done
        known = todo and self.sources["nothing"] < todo
        return {
            "kind": self.kind,
            "base": self.base,
            "steps": self.steps,
            "done": self.done,
            "shared": self.shared,
            "to_do": todo,
            "hours": self.seconds / HOUR if known or not todo else None,
            "gpu_hours": self.gpu_seconds / HOUR if known or not todo else None,
            "device_bytes": self.device_bytes or None,
            "rss_bytes": self.rss_bytes or None,
            "disk_bytes": self.disk_bytes or None,
            "judge_usd": self.usd if not self.unpriced else None,
            "judge_calls": self.calls if not self.uncounted else None,
            "from": dict(self.sources),
            "devices": sorted(self.devices),
            "assumed": list(self.assumed),
        }


@dataclass
class StudyCosts:
    """What a study will take."""

    card: Card | None
    lines: list[Line]
    merged_peak_bytes: int
    """Of merged checkpoints that lie on the disk at once, where one process makes them; of each worker as much."""
    kept_bytes: int
    """Of all else that is to be written, as far as it is known."""
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        lines = [line.to_json() for line in self.lines]
        hours = [line["gpu_hours"] for line in lines]
        usd = [line["judge_usd"] for line in lines]
        calls = [line["judge_calls"] for line in lines]
        return {
            "card": {**self.card.__dict__, "utilisation": UTILISATION} if self.card is not None else None,
            "gpu_hours": sum(hours) if None not in hours else None,
            "gpu_hours_known": sum(one for one in hours if one is not None),
            "judge_usd": sum(usd) if None not in usd else None,
            "judge_calls": sum(calls) if None not in calls else None,
            "merged_peak_bytes": self.merged_peak_bytes,
            "kept_bytes": self.kept_bytes,
            "lines": lines,
            "warnings": self.warnings,
        }


def study_costs(
    plan: StudyPlan,
    states: Sequence[StepState],
    *,
    card: Card | None = None,
    other_runs: Sequence[Path] = (),
) -> StudyCosts:
    """What is to do of a study, and what that takes.

    Args:
        plan: of the study.
        states: of its steps, as far as its run folder knows them.
        card: the GPU that it is planned for.
        other_runs: run folders whose records count too.

    Raises:
        UserError: a folder without records.
    """
    known = {state.key: state for state in states}
    whole = sized(plan, card)
    records = Records()
    for step in plan.graph.steps.values():
        state = known.get(step.id)
        if state is not None and state.state == "done" and state.costs is not None:
            records.add(step.kind, step.whole, step.factors, whole.limits.get(step.id), state.costs)
    for run in other_runs:
        for key, costs in records_of(run).found.items():
            records.found.setdefault(key, []).extend(costs)
    lines: dict[tuple[str, str], Line] = {}
    seen: dict[Key, Estimate] = {}
    for step in plan.graph:
        line = lines.setdefault((step.kind, whole.bases[step.id]), Line(step.kind, whole.bases[step.id]))
        line.steps += 1
        line.shared += whole.uses[step.id] - 1
        state = known.get(step.id)
        if state is not None and state.state == "done":
            line.done += 1
            continue
        keys = records.keys(step.kind, step.whole, step.factors, whole.limits.get(step.id))
        place = (*keys, line.base) if keys else (step.id,)
        if place not in seen:
            seen[place] = _estimated(records.like(keys, card), whole.estimate(step))
        _add(line, seen[place])
    warnings = whole.warnings({key for key, state in known.items() if state.state == "done"})
    merged, kept = _disk(plan, known, whole, lines.values())
    return StudyCosts(card, list(lines.values()), merged, kept, warnings)


def _estimated(some: Sequence[Costs], by_size: Estimate) -> Estimate:
    """What one step takes: the median of those like it, else by its size."""
    if not some:
        return by_size
    judges = [one.judge for one in some if one.judge is not None]
    usd = [judge.usd for judge in judges if judge.usd is not None]
    # A step whose questions another had put already called nobody: by its size it would.
    calls = max([judge.calls for judge in judges], default=0) or by_size.calls
    return Estimate(
        source="records",
        seconds=statistics.median(one.all_seconds for one in some),
        gpu_seconds=statistics.median(one.gpu_seconds for one in some),
        device_bytes=max((one.device_bytes or 0 for one in some), default=0) or by_size.device_bytes,
        rss_bytes=max(one.rss_bytes or 0 for one in some),
        disk_bytes=round(statistics.median(one.disk_bytes or 0 for one in some)),
        usd=statistics.median(usd) if usd else (0.0 if not judges else None),
        calls=calls,
        device=some[0].device or "CPU",
    )


def _add(line: Line, one: Estimate) -> None:
    line.sources[one.source] += 1
    line.seconds += one.seconds or 0.0
    line.gpu_seconds += one.gpu_seconds or 0.0
    line.device_bytes = max(line.device_bytes, one.device_bytes or 0)
    line.rss_bytes = max(line.rss_bytes, one.rss_bytes or 0)
    line.disk_bytes += one.disk_bytes or 0
    line.usd += one.usd or 0.0
    line.unpriced += one.usd is None
    line.calls += one.calls or 0
    line.uncounted += one.calls is None
    line.assumed |= dict.fromkeys(one.assumed)
    if one.device is not None:
        line.devices.add(one.device)


def _disk(plan: StudyPlan, known: Mapping[str, StepState], whole: Sized, lines: Iterable[Line]) -> tuple[int, int]:
    """Bytes of merged checkpoints at their peak, as one process makes them, and of all else."""
    done = {key for key, state in known.items() if state.state == "done"}
    peak = peak_of_merged(plan, done, whole.checkpoint_bytes, kept="merge" in plan.read.spec.keep)
    kept = sum(line.disk_bytes for line in lines if line.kind != "merge")
    return peak, kept


def refuse_what_cannot_fit(plan: StudyPlan, done: Collection[str], card: Card) -> None:
    """Stop before anything runs where a step needs more memory than its GPU has, whatever else is tried.

    Raises:
        UserError: naming the steps, and what their weights alone take.
    """
    wrong = sized(plan, card).cannot_fit(done)
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(
            f"study {plan.read.spec.study}, {card.name}",
            f"{card.memory / GIB:g} GB are less than its steps need: {'; '.join(wrong[:4])}{more}",
            "Take a larger card, a smaller base, or adapter: qlora (0.52 bytes a weight in place of 2).",
        )
