"""Whether two engines agree: some samples of every task through both, and what follows for comparing their numbers.

Engines compute the same function with other kernels, so in bf16 their log-probabilities differ in the last bits, and a
greedy answer takes another turn where two tokens were nearly as likely. That is noise. What is not: log-probabilities
that are further apart than rounding explains, and answers that part where one token was clearly the likelier. Here both
are measured; a comparison of numbers from two engines asks for a record of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from harness.config import Config
from harness.errors import CorruptionError, UserError
from harness.records import SCHEMA_VERSION, Output, Request, Sample
from harness.report_text import task_label
from harness.results import RunResult
from harness.store import RunStore, read_json


class Bound(Config):
    """How far apart two engines may be, and still count as one.

    bf16 has 8 significant bits: logits between 16 and 32 are 0.125 apart, and those of language models lie there. Each
    engine rounds to half of that, so a log-probability may move by about 0.125 either way: 0.25 between two engines. On
    average rounding cancels; 0.05 is a fifth of that. In fp32 the same reasoning gives less than 0.00001; 0.001 leaves
    room for other orders of summation.
    """

    largest: float = Field(description="largest difference of a log-probability (nats per token)")
    mean: float = Field(description="mean absolute difference of log-probabilities (nats per token)")
    parted: float = Field(0.05, description="share of greedy answers that part where one token was clearly likelier")


LOW = Bound(largest=0.25, mean=0.05)
FULL = Bound(largest=1e-3, mean=1e-4)


class TaskParity(Config):
    """Two engines on some samples of one task of one arm."""

    arm: str
    task: str
    variant: str
    samples: int = Field(description="samples that both engines answered")
    answers: int = Field(0, description="generated answers that were compared; sampled ones are not")
    tokens_equal: float | None = Field(None, description="mean share of an answer's tokens up to the first difference")
    texts_equal: float | None = Field(None, description="share of answers with the same text")
    parted: int = Field(0, description="answers that part where one token was clearly likelier")
    scored: int = Field(0, description="continuations whose log-probability both engines gave")
    logprob_mean: float | None = Field(None, description="mean absolute difference (nats per token)")
    logprob_largest: float | None = Field(None, description="largest absolute difference (nats per token)")
    logprob_largest_sum: float | None = Field(None, description="largest absolute difference of a whole one (nats)")
    errors: int = Field(0, description="requests that an engine could not answer")

    def problems(self, bound: Bound) -> list[str]:
        """Where the engines disagree beyond the bound."""
        found = []
        for name in ("largest", "mean"):
            value = getattr(self, f"logprob_{name}")
            if value is not None and value > getattr(bound, name):
                found.append(f"{name} log-probability difference {value:.3g} nats per token > {getattr(bound, name):g}")
        if self.parted > bound.parted * self.answers:
            found.append(f"{self.parted} of {self.answers} answers part where one token was clearly likelier")
        if not self.answers and not self.scored:
            found.append("nothing could be compared")
        return found


class ParityRecord(Config):
    """``parity.json``: what a second engine answered to the same questions."""

    schema_version: int = SCHEMA_VERSION
    key: str = Field(description="digest of steps, engines and number of samples: whether it must be made again")
    samples: int = Field(description="samples per task, chosen by the digest of their ids")
    engines: tuple[str, str] = Field(description="the run's engine, and the second")
    identities: tuple[dict[str, Any], dict[str, Any]] = Field(description="versions and options that move numbers")
    bound: Bound
    tasks: tuple[TaskParity, ...] = ()

    @property
    def problems(self) -> list[str]:
        """Everything that lies beyond the bound."""
        return [
            f"{one.arm}, {task_label(one.task, one.variant)}: {text}"
            for one in self.tasks
            for text in one.problems(self.bound)
        ]

    @property
    def agrees(self) -> bool:
        """Whether the engines may stand in one table."""
        return bool(self.tasks) and not self.problems

    def summary(self) -> str:
        """One line for reports."""
        largest = max((one.logprob_largest for one in self.tasks if one.logprob_largest is not None), default=None)
        means = [(one.logprob_mean, one.scored) for one in self.tasks if one.logprob_mean is not None]
        answers = sum(one.answers for one in self.tasks)
        parts = [f"engines {self.engines[0]} and {self.engines[1]} on {self.samples} samples per task"]
        if answers:
            texts = sum((one.texts_equal or 0.0) * one.answers for one in self.tasks) / answers
            tokens = sum((one.tokens_equal or 0.0) * one.answers for one in self.tasks) / answers
            parts.append(f"{texts:.1%} of {answers} texts and {tokens:.1%} of tokens up to the first difference equal")
        if largest is not None:
            mean = sum(value * n for value, n in means) / sum(n for _, n in means)
            parts.append(
                f"log-probabilities differ by {mean:.2g} on average and {largest:.2g} at most (nats per token)"
            )
        bound = f"at most {self.bound.mean:g} and {self.bound.largest:g}, {self.bound.parted:.0%} clear differences"
        verdict = "they agree" if self.agrees else "they DISAGREE"
        return f"parity: {'; '.join(parts)}; {verdict} within the bound ({bound})".replace(
            "DISAGREE within", "DISAGREE beyond"
        )


def choose(samples: Sequence[Sample], count: int) -> list[Sample]:
    """``count`` samples, by the digest of their ids: the same ones in every run, from every leaf."""
    ranked = sorted(samples, key=lambda sample: hashlib.sha256(sample.id.encode(errors="surrogatepass")).digest())
    wanted = {sample.id for sample in ranked[:count]}
    return [sample for sample in samples if sample.id in wanted]


# -------------------------------------------------------------------------------------------------------- measuring


def probe_of(request: Request, output: Output) -> Request | None:
    """What asks an engine for the log-probability of an answer that the first engine gave; None: there is nothing."""
    if request.kind == "loglikelihood":
        return None
    if not request.prompt_ids or not output.token_ids or output.error is not None:
        return None
    return Request(
        "loglikelihood", request.prompt_ids, output.token_ids, adapter=request.adapter, control=request.control
    )


@dataclass(frozen=True)
class Turn:
    """Where two greedy answers part: requests for the log-probability of what either engine did there.

    An engine that ended its answer took one of the tokens that end it: the likeliest of them counts.
    """

    first: tuple[Request, ...]
    second: tuple[Request, ...]


def turn_of(request: Request, first: Output, second: Output, ends: Sequence[int]) -> Turn | None:
    """Where two answers part; None if they do not, or if one spent its token budget where the other went on."""
    shared = shared_tokens(first.token_ids, second.token_ids)
    sides = []
    for output in (first, second):
        tokens = output.token_ids[shared : shared + 1] or (tuple(ends) if output.finish == "stop" else ())
        prefix = request.prompt_ids + first.token_ids[:shared]
        asked = replace(request, kind="loglikelihood", prompt_ids=prefix, decoding=None, prompt="", messages=None)
        sides.append(tuple(replace(asked, continuation_ids=(token,)) for token in tokens))
    if shared == max(len(first.token_ids), len(second.token_ids)) or not all(sides):
        return None
    return Turn(sides[0], sides[1])


def shared_tokens(ids: Sequence[int], others: Sequence[int]) -> int:
    """Number of equal tokens before the first difference."""
    return next(
        (at for at, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other),
        min(len(ids), len(others)),
    )


class Tally:
    """Collects what two engines said about one task of one arm."""

    def __init__(self, arm: str, task: str, variant: str, samples: int, bound: Bound) -> None:
        self._named: dict[str, Any] = {"arm": arm, "task": task, "variant": variant, "samples": samples}
        self._bound = bound
        self._shares: list[float] = []
        self._texts: list[bool] = []
        self._per_token: list[float] = []
        self._sums: list[float] = []
        self._open = 0
        self._excused = 0
        self.errors = 0

    def answers(self, first: Output, second: Output) -> None:
        """Two answers to one prompt."""
        if first.error is not None or second.error is not None:
            self.errors += 1
            return
        longest = max(len(first.token_ids), len(second.token_ids))
        shared = shared_tokens(first.token_ids, second.token_ids)
        self._shares.append(shared / longest if longest else float(first.text == second.text))
        self._texts.append(first.text == second.text)
        self._open += shared != longest

    def turn(self, first: Sequence[Output], second: Sequence[Output]) -> None:
        """The second engine's log-probabilities, where two answers part, of what either engine did."""
        known = [
            max((one.logprob for one in side if one.logprob is not None), default=None) for side in (first, second)
        ]
        if known[0] is not None and known[1] is not None and known[1] - known[0] <= 2 * self._bound.largest:
            self._excused += 1

    def logprobs(self, first: Output, second: Output, tokens: int) -> None:
        """Log-probabilities of one continuation."""
        if first.logprob is None or second.logprob is None or first.error or second.error:
            self.errors += 1
            return
        gap = abs(first.logprob - second.logprob)
        self._sums.append(gap)
        self._per_token.append(gap / max(1, tokens))

    def result(self) -> TaskParity:
        """The figures."""
        return TaskParity(
            **self._named,
            answers=len(self._texts),
            tokens_equal=_mean(self._shares),
            texts_equal=_mean([float(one) for one in self._texts]),
            parted=self._open - self._excused,
            scored=len(self._sums),
            logprob_mean=_mean(self._per_token),
            logprob_largest=max(self._per_token, default=None),
            logprob_largest_sum=max(self._sums, default=None),
            errors=self.errors,
        )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------------------------------------------------- records


def stored_parity(run: RunResult) -> ParityRecord | None:
    """The parity record of a run, where there is one.

    Raises:
        CorruptionError: it is damaged.
    """
    path = RunStore(run.root).parity_file
    if not path.is_file():
        return None
    try:
        return ParityRecord.model_validate(read_json(path))
    except ValueError as error:
        raise CorruptionError(f"{path}: not a parity record ({error}); delete it and run --parity again") from None


def check_engines(a: RunResult, b: RunResult, *, allowed: bool = False) -> tuple[str, ...]:
    """What is to be said about the engines of two runs whose numbers shall stand side by side.

    Raises:
        UserError: they come from different engines, and no parity record of either run shows that these agree.
    """
    names = [str((run.plan.get("engine") or {}).get("name")) for run in (a, b)]
    if names[0] == names[1]:
        return ()
    said = f"engine differs: {names[0]} in A, {names[1]} in B"
    tasks = {task.name for task in a.tasks} & {task.name for task in b.tasks}
    why = "no parity record shows that they agree"
    for run in (a, b):
        record = stored_parity(run)
        if record is None or set(record.engines) != set(names):
            continue
        missing = sorted(tasks - {one.task for one in record.tasks})
        if record.agrees and not missing:
            return (f"{said}; {record.summary()}",)
        why = "; ".join(record.problems[:2]) if record.problems else f"no parity was measured on {', '.join(missing)}"
    if allowed:
        return (f"{said}, and {why}: a difference may be the engines' (--allow-engine-mismatch)",)
    raise UserError(
        f"{a.root} and {b.root}",
        f"come from different engines ({names[0]}, {names[1]}), and {why}",
        f"Run one of them again with --parity 16 --parity-engine {names[1]} (or {names[0]}), or pass "
        "--allow-engine-mismatch.",
    )
