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

from harness.core.parity_record import Bound, TaskParity
from harness.core.records import Output, Request, Sample

LOW = Bound(largest=0.25, mean=0.05)
FULL = Bound(largest=1e-3, mean=1e-4)


def choose(samples: Sequence[Sample], count: int) -> list[Sample]:
    """``count`` samples, by the digest of their ids: the same ones in every run, from every leaf."""
    ranked = sorted(samples, key=lambda sample: hashlib.sha256(sample.id.encode(errors="surrogatepass")).digest())
    wanted = {sample.id for sample in ranked[:count]}
    return [sample for sample in samples if sample.id in wanted]


def probe_of(request: Request, output: Output) -> Request | None:
    """What asks an engine for the log-probability of an answer that the first engine gave; None: there is nothing."""
    if request.kind == "loglikelihood":
        return None
    if not request.prompt_ids or not output.token_ids or output.error is not None:
        return None
    return Request(
        "loglikelihood",
        request.prompt_ids,
        output.token_ids,
        adapter=request.adapter,
        control=request.control,
        control_at=request.control_at,
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
