"""What was measured of two engines on the same prompts, as it is written to disk."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from harness.core.config import Config
from harness.core.records import SCHEMA_VERSION
from harness.core.text import task_label


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
