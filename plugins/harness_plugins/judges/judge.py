"""A judge: a language model that is asked many small questions, each of them paid for once.

Questions are kept by content (who judges, what is asked, how the reply is drawn, which attempt) in a journal in the
scorer's folder: an interrupted run, a spent budget or a failed endpoint loses nothing, and equal questions are asked
once. A reply that cannot be read is asked for again, with another seed and at `retry_temperature`, up to `retries`
times: at temperature 0 the same question would bring the same reply. What then is still unread has no value, and says
why. The journal holds tokens, not prices: cost is what they cost at the prices of now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import Decoding, Journal, JudgeCosts, StepError, digest_of
from harness_plugins.judges.options import (
    JudgeOptions,
    check_judge,
    judge_identity,
    judge_label,
    settled,
    slug_of,
    with_judge,
)
from harness_plugins.judges.words import Ask, Budget, Judged, Question, Reply, Spent, T, Unparsable, Usage

__all__ = [
    "Judge",
    "JudgeOptions",
    "Judged",
    "Question",
    "Reply",
    "Unparsable",
    "Usage",
    "check_judge",
    "judge_identity",
    "judge_label",
    "with_judge",
]


class Judge:
    """A judge and its journal. Opened when the first question comes that is not in the journal; one for many asks.

    Args:
        options: who judges and how.
        where: what messages call it, such as "scorer attack_llm".
        folder: where the journal goes, one that all steps of a run share (``ScorerContext.shared``): what one step has
            asked no other pays for, and ``max_cost`` holds for all of them. None: nothing is kept.
        open_engine: ``ScorerContext.open_engine``, for a local judge.

    Raises:
        UserError: as :func:`check_judge`; or the judge's name on its server cannot be told.
    """

    def __init__(
        self,
        options: JudgeOptions,
        where: str,
        folder: Path | None = None,
        open_engine: Callable[..., Any] | None = None,
    ) -> None:
        check_judge(options, where)
        self.options, self.where = settled(options, where), where
        self.usage = Usage()
        self.bill = JudgeCosts()
        """What replies have cost that came since :meth:`new_bill`: those of the journal were paid for before."""
        self.facts: dict[str, Any] = {}
        self._identity = judge_identity(self.options, where)
        self._open_engine = open_engine
        self._budget = Budget(self.options)
        self._backend: Any = None
        self._known: dict[str, Reply] = {}
        self._journal: Journal | None = None
        if folder is not None:
            self._journal = Journal(folder / f"{slug_of(self.options)}-{digest_of(self._identity)[:12]}.jsonl.gz")

    @property
    def spent(self) -> float:
        """What all replies in the journal cost (USD)."""
        return self._budget.paid.cost

    def new_bill(self) -> None:
        """Count what is paid from here on."""
        self.bill = JudgeCosts()

    def ask(
        self,
        questions: Sequence[Question],
        parse: Callable[[Reply], T],
        progress: Callable[[int], None] = lambda more: None,
        stored: Callable[[int], None] = lambda more: None,
    ) -> list[Judged[T]]:
        """Put every question, and read the replies.

        Args:
            questions: equal ones are asked once.
            parse: reads a reply; raises :class:`Unparsable` where it says nothing usable.
            progress: told how many more questions are settled.
            stored: told how many more an earlier run has settled.

        Raises:
            StepError: ``max_cost`` is reached; what is judged stays in the journal. Or no question got a reply.
            UserError: no question at all can be answered (nobody listens, the key is refused, no log-probabilities).
        """
        self._load()
        try:
            return self._asked(questions, parse, progress, stored)
        finally:
            if self._journal is not None:
                self._journal.close()

    def close(self) -> None:
        """Release the judge; it opens again when needed."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _load(self) -> None:
        """Read the journal again: another scorer may have asked the same judge meanwhile."""
        self.usage = Usage()
        self._budget.held = 0.0
        if self._journal is None:
            return
        paid = self._budget.paid = Usage()
        self._known = {row["key"]: Reply(**row["reply"]) for rows in self._journal.recover()[0] for row in rows}
        for reply in self._known.values():
            paid.add(reply, self.options)

    def _asked(
        self,
        questions: Sequence[Question],
        parse: Callable[[Reply], T],
        progress: Callable[[int], None],
        stored: Callable[[int], None],
    ) -> list[Judged[T]]:
        keys = [digest_of(_content(question)) for question in questions]
        often = Counter(keys)
        unique = dict(zip(keys, questions, strict=True))
        judged: dict[str, Judged[T]] = {}
        waiting = list(unique)
        for attempt in range(self.options.retries + 1):
            asks = {key: self._ask(unique[key], attempt) for key in waiting}
            last = attempt == self.options.retries
            again: set[str] = set()
            for replies, known in self._replies(asks, attempt):
                for key, reply in replies.items():
                    judged[key] = self._read(reply, parse, attempt + 1)
                    # Log-probabilities do not change by asking again, and a call that failed had its own attempts.
                    retry = judged[key].reason is not None and reply.error is None and not unique[key].alternatives
                    if retry and not last:
                        again.add(key)
                (stored if known else progress)(sum(often[key] for key in replies if key not in again))
            waiting = [key for key in waiting if key in again]
            if not waiting:
                break
        failed = sum(one.reply is not None and one.reply.error is not None for one in judged.values())
        if judged and failed == len(judged):
            raise self._silent(list(judged.values()))
        self.usage.failed = failed
        self.usage.unparsable = sum(one.reason is not None for one in judged.values()) - failed
        return [judged[key] for key in keys]

    def _ask(self, question: Question, attempt: int) -> Ask:
        options = self.options
        temperature = options.temperature if attempt == 0 else max(options.temperature, options.retry_temperature)
        return Ask(
            question,
            Decoding(
                max_new_tokens=1 if question.alternatives else options.max_new_tokens,
                temperature=temperature,
                seed=options.seed + attempt + (options.retries + 1) * question.repeat,
            ),
        )

    def _replies(self, asks: Mapping[str, Ask], attempt: int) -> Iterator[tuple[Mapping[str, Reply], bool]]:
        """Replies of the journal (True), and of the judge for the rest, which go to the journal as they come."""
        names = {key: self._name(ask, attempt) for key, ask in asks.items()}
        found = {key: self._known[name] for key, name in names.items() if name in self._known}
        self.usage.reused += len(found)
        for reply in found.values():
            self.usage.add(reply, self.options)
        yield found, True
        missing = set(asks) - set(found)
        left = set(missing)
        if missing:
            backend = self._opened(asks[next(iter(missing))])
            try:
                for batch in backend.replies(asks, missing):
                    self._keep([(names[key], reply) for key, reply in batch])
                    left -= {key for key, _ in batch}
                    for _, reply in batch:
                        self.usage.add(reply, self.options)
                    yield dict(batch), False
            except Spent:
                raise self._spent(len(left)) from None

    def _keep(self, replies: Sequence[tuple[str, Reply]]) -> None:
        """A call that failed is not kept: the next run makes it again."""
        self.usage.calls += len(replies)
        prompt, said = (sum(getattr(reply, name) for _, reply in replies) for name in ("prompt_tokens", "reply_tokens"))
        usd = self.options.price(prompt, said) if self.options.priced else None
        self.bill += JudgeCosts(calls=len(replies), prompt_tokens=prompt, reply_tokens=said, usd=usd)
        kept = [(name, reply) for name, reply in replies if reply.error is None]
        if self._journal is not None and kept:
            self._journal.append([{"key": name, "reply": _stored(reply)} for name, reply in kept])
        for name, reply in kept:
            self._known[name] = reply
            self._budget.paid.add(reply, self.options)

    def _read(self, reply: Reply, parse: Callable[[Reply], T], attempts: int) -> Judged[T]:
        if reply.error is not None:
            return Judged(None, f"the judge did not reply: {reply.error}", reply, attempts, reply.passing)
        try:
            return Judged(parse(reply), None, reply, attempts)
        except Unparsable as problem:
            return Judged(None, f"{problem} ({attempts} attempts)" if attempts > 1 else str(problem), reply, attempts)

    def _name(self, ask: Ask, attempt: int) -> str:
        """Identity of one attempt: everything that can change the reply."""
        decoding = ask.decoding.model_dump(mode="json")
        return digest_of([self._identity, _content(ask.question), decoding, attempt])

    def _opened(self, ask: Ask) -> Any:
        if self._backend is None:
            from harness_plugins.judges.backends import Endpoint, Local

            if self.options.remote:
                self._backend = Endpoint(self.options, self.where, self._budget)
            else:
                needs = ("loglikelihood",) if ask.question.alternatives else ("generate",)
                self._backend = Local(self.options, self.where, self._open_engine, needs)
            self.facts = self._backend.facts
        return self._backend

    def _silent(self, judged: Sequence[Judged[T]]) -> StepError:
        often = Counter(one.reason for one in judged).most_common(1)[0][0]
        what = f"none of {len(judged)} questions got a reply, most often because: {often}"
        return StepError(self.where, what, "The same command asks again.")

    def _spent(self, left: int) -> StepError:
        return StepError(
            f"{self.where}, max_cost",
            f"judging has cost {self.spent:.4f} USD in this run, and the next question could go beyond "
            f"{self.options.max_cost:g} USD; {left} are not asked",
            "What is judged is kept: raise max_cost and run the same command again to go on.",
        )


def _content(question: Question) -> list[Any]:
    messages = [dict(message) for message in question.messages]
    return [messages, list(question.alternatives), question.repeat]


def _stored(reply: Reply) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    plain = Reply()
    every = {name: getattr(reply, name) for name in Reply.__dataclass_fields__}
    return {name: value for name, value in every.items() if value != getattr(plain, name)}
