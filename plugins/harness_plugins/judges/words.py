"""What a judge is asked, what it replied, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from harness import Decoding, Finish, Message
from harness_plugins.judges.options import JudgeOptions

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One question. With ``alternatives`` the judge only begins to reply, and their log-probabilities are told.

    ``repeat`` tells equal questions apart that are meant to be asked anew.
    """

    messages: tuple[Message, ...]
    alternatives: tuple[str, ...] = ()
    repeat: int = 0


@dataclass(frozen=True)
class Reply:
    """What the judge said; or, with ``error``, why no reply could be had.

    ``logprobs`` are in nats. ``counted`` is False where a server told no token counts: they are upper bounds then.
    """

    text: str = ""
    finish: Finish | None = None
    logprobs: Mapping[str, float] | None = None
    prompt_tokens: int = 0
    reply_tokens: int = 0
    counted: bool = True
    error: str | None = None
    passing: bool = False
    """With an error: whether another run may bring a reply."""


@dataclass(frozen=True)
class Ask:
    """One attempt at a question."""

    question: Question
    decoding: Decoding

    @property
    def messages(self) -> tuple[Message, ...]:
        """What is sent: half a surrogate pair, which a server's answer can hold, is in no encoding."""
        return tuple(
            {key: text.encode(errors="replace").decode() for key, text in message.items()}
            for message in self.question.messages
        )


@dataclass(frozen=True)
class Judged(Generic[T]):
    """A value, or the reason why there is none. ``again``: the call itself failed, so another run may do better."""

    value: T | None
    reason: str | None = None
    reply: Reply | None = None
    attempts: int = 0
    again: bool = False


class Unparsable(Exception):  # noqa: N818 - no error of the program: a reply that does not say what was asked
    """Raised by a parser, with the reason."""


class Spent(Exception):  # noqa: N818
    """No further question may be asked: it might cost more than is left."""


@dataclass
class Usage:
    """What the verdicts of one :meth:`Judge.ask` took; tokens and cost whenever they were paid for."""

    calls: int = 0
    """Replies that came now."""
    reused: int = 0
    """Replies that were in the journal, of an earlier run or of another step."""
    failed: int = 0
    """Questions to which no reply could be had."""
    unparsable: int = 0
    """Questions whose every reply said nothing usable."""
    estimated: int = 0
    """Replies without token counts: upper bounds are counted."""
    prompt_tokens: int = 0
    reply_tokens: int = 0
    cost: float = 0.0
    """USD, at the prices given."""

    def add(self, reply: Reply, options: JudgeOptions) -> None:
        """Count one reply's tokens."""
        self.prompt_tokens += reply.prompt_tokens
        self.reply_tokens += reply.reply_tokens
        self.estimated += not reply.counted
        self.cost = options.price(self.prompt_tokens, self.reply_tokens)

    def __str__(self) -> str:
        """One line for a report; says the same whether or not the run was interrupted."""
        parts = [f"{self.prompt_tokens:,} prompt and {self.reply_tokens:,} reply tokens"]
        parts += [f"{self.cost:.4f} USD"] if self.cost else []
        parts += [f"{self.estimated} replies without token counts (upper bounds taken)"] if self.estimated else []
        parts += [f"{self.failed} questions without a reply"] if self.failed else []
        parts += [f"{self.unparsable} without a verdict"] if self.unparsable else []
        return ", ".join(parts)


@dataclass
class Budget:
    """What may still be spent. Every call in flight holds back the most that it can cost."""

    options: JudgeOptions
    paid: Usage = field(default_factory=Usage)
    held: float = 0.0

    def take(self, most: float) -> bool:
        """Hold back ``most`` (USD) for a call; False when that could go beyond the limit."""
        limit = self.options.max_cost
        if limit is not None and self.paid.cost + self.held + most > limit:
            return False
        self.held += most
        return True

    def settle(self, most: float) -> None:
        """The call has ended: its tokens are counted elsewhere."""
        self.held = max(0.0, self.held - most)
