"""Drive one open engine over a task's requests, of one arm or many; every answer is in a journal before it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.contracts.engine import Session
from harness.core.errors import StepError
from harness.core.progress import Bar, stored
from harness.core.records import Answer, Output, Request, Sample
from harness.steps.journal import Damage, Journal, rows_digest


@dataclass
class Answered:
    """All answers of one task, and how they came about."""

    answers: list[Answer]
    digest: str
    """SHA-256 of the answers in sample order: what scores are keyed by."""
    computed: int = 0
    reused: int = 0
    errors: int = 0
    batch_dependent: int = 0
    damage: Damage = field(default_factory=Damage)

    def wholly_failed(self) -> StepError | None:
        """The error in which a step ends whose samples have no answer at all: it is no result, and is done again."""
        reasons = [answer.error for answer in self.answers]
        if not reasons or None in reasons:
            return None
        often = Counter(reasons).most_common(1)[0][0]
        what = f"none of {len(reasons)} samples has an answer, most often because: {often}"
        return StepError("answers", what, "The same command asks again.")


def key_of(sample_id: str, index: int) -> tuple[str, int]:
    """Where an output belongs: sample and position among its requests."""
    return sample_id, index


def row_of(sample: Sample, index: int, digest: str, output: Output) -> dict[str, Any]:
    """One row of answers.jsonl.gz."""
    return {"item": sample.id, "index": index, "digest": digest, "output": output.to_json()}


def _known(
    batches: Sequence[Sequence[dict[str, Any]]], wanted: dict[tuple[str, int], str]
) -> dict[Any, dict[str, Any]]:
    """Rows of a journal that answer the very requests asked now (same digest); failed calls are asked again."""
    found: dict[Any, dict[str, Any]] = {}
    for rows in batches:
        for row in rows:
            key = key_of(row["item"], row["index"])
            if wanted.get(key) == row["digest"] and "error" not in row["output"]:
                found[key] = row
    return found


@dataclass
class Part:
    """One arm's share of what is asked at once: its samples, and the journal that its answers go to."""

    samples: Sequence[Sample]
    journal: Journal
    send: Callable[[Request], Request] = lambda request: request
    """The request as the open engine knows it: an adapter may go by another name there, or be folded in."""
    asked: list[_Asked] = field(default_factory=list, init=False)
    rows: dict[Any, dict[str, Any]] = field(default_factory=dict, init=False)
    reused: int = field(default=0, init=False)
    damage: Damage = field(default_factory=Damage, init=False)

    def recover(self) -> None:
        """Read what the journal holds of these very requests."""
        self.asked = [
            _Asked(self, sample, index, request, request.digest)
            for sample in self.samples
            for index, request in enumerate(sample.requests)
        ]
        wanted = {one.key: one.digest for one in self.asked}
        if len(wanted) != len(self.asked):
            raise StepError("answers", "two samples of the task have the same id")
        old, self.damage = self.journal.recover()
        self.rows = _known(old, wanted)
        self.reused = len(self.rows)

    def answered(self) -> Answered:
        """All answers, once they are there."""
        ordered = [self.rows[one.key] for one in self.asked]
        outputs_by_sample: dict[str, list[Output]] = {}
        for row in ordered:
            outputs_by_sample.setdefault(row["item"], []).append(Output.from_json(row["output"]))
        return Answered(
            answers=[Answer(sample.id, tuple(outputs_by_sample[sample.id])) for sample in self.samples],
            digest=rows_digest(ordered),
            computed=len(self.asked) - self.reused,
            reused=self.reused,
            errors=sum("error" in row["output"] for row in ordered),
            batch_dependent=sum("batch_dependent" in row["output"] for row in ordered),
            damage=self.damage,
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    part: Part
    sample: Sample
    index: int
    request: Request
    digest: str

    @property
    def key(self) -> tuple[str, int]:
        return key_of(self.sample.id, self.index)

    @property
    def missing(self) -> bool:
        return self.key not in self.part.rows


def answer(
    parts: Sequence[Part],
    open_session: Callable[[], Session],
    advance: Callable[[int], None] = lambda items: None,
    *,
    batchwise: bool = True,
) -> list[Answered]:
    """Answer every request of every part; what a part's journal holds is not asked again.

    The parts are asked together, so that an engine which serves several adapters in one batch can. Batches are planned
    from the whole list, and a batch of which anything is missing runs again whole, so that an interrupted task ends
    with the very answers of an uninterrupted one. A request that failed is asked once more in the next run.

    Args:
        parts: one per arm, each with samples and journal.
        open_session: called only if something is missing.
        advance: told how many requests were answered.
        batchwise: whether the requests of a batch may influence each other; otherwise only what is missing of a batch
            is asked (an endpoint: every call costs).
    """
    for part in parts:
        part.recover()
    # A part that has everything takes no place in the batches of the others.
    flat = [one for part in parts if part.reused < len(part.asked) for one in part.asked]
    session = open_session() if flat else None
    stored(advance, sum(part.reused for part in parts))
    if session is not None:
        _ask(flat, session, advance, batchwise)
    for part in parts:
        part.journal.close()
    return [part.answered() for part in parts]


def _ask(flat: Sequence[_Asked], session: Session, advance: Callable[[int], None], batchwise: bool) -> None:
    sent = [one.part.send(one.request) for one in flat]
    plan = session.batches(sent)
    _check_plan(plan, len(flat))
    for batch in plan:
        missing = [i for i in batch if flat[i].missing]
        if not missing:
            continue
        asked = batch if batchwise else missing
        bar = Bar(advance, len(missing))
        session.progress = bar.advance
        outputs = session.run([sent[i] for i in asked])
        if len(outputs) != len(asked):
            raise StepError("answers", f"the engine returned {len(outputs)} outputs for {len(asked)} requests")
        by_index = {i: output.checked() for i, output in zip(asked, outputs, strict=True)}
        # What is stored stays, byte for byte: where batches matter at all, only the lost answers may differ.
        new: dict[int, dict[Any, dict[str, Any]]] = {}
        for i in missing:
            one = flat[i]
            new.setdefault(id(one.part), {})[one.key] = row_of(one.sample, one.index, one.digest, by_index[i])
        for part in {id(flat[i].part): flat[i].part for i in missing}.values():
            part.journal.append(list(new[id(part)].values()))
            part.rows.update(new[id(part)])
        bar.fill()


def ask(session: Session, requests: Sequence[Request]) -> list[Output]:
    """Answers that nobody keeps, in the order of the requests."""
    outputs: dict[int, Output] = {}
    plan = session.batches(requests) if requests else []
    _check_plan(plan, len(requests))
    for batch in plan:
        answered = session.run([requests[i] for i in batch])
        outputs.update({i: output.checked() for i, output in zip(batch, answered, strict=True)})
    return [outputs[index] for index in range(len(requests))]


def load_answers(samples: Sequence[Sample], journal: Journal) -> Answered | None:
    """The stored answers of an ended step; None when one is missing or answers another request."""
    old, damage = journal.recover()
    wanted = {key_of(s.id, i): r.digest for s in samples for i, r in enumerate(s.requests)}
    found: dict[Any, dict[str, Any]] = {}
    for rows in old:
        found.update({key_of(row["item"], row["index"]): row for row in rows})
    if any(found.get(key, {}).get("digest") != digest for key, digest in wanted.items()):
        return None
    ordered = [found[key] for key in wanted]
    answers = [
        Answer(s.id, tuple(Output.from_json(found[key_of(s.id, i)]["output"]) for i in range(len(s.requests))))
        for s in samples
    ]
    return Answered(answers, rows_digest(ordered), reused=len(ordered), damage=damage)


def _check_plan(plan: Sequence[Sequence[int]], total: int) -> None:
    seen = sorted(index for batch in plan for index in batch)
    if seen != list(range(total)):
        raise StepError("answers", "the engine's batch plan does not hold every request exactly once")
