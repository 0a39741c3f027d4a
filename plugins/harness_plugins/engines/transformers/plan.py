"""How the transformers engine cuts requests into batches, and ends answers. No heavy imports."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness import Decoding, Request

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Limits:
    """What a batch may hold: forward rows, padded tokens (prompt and answer), scored positions; and what the model may.

    ``vocabulary`` is the number of token ids that the model has embeddings for.
    """

    rows: int
    tokens: int
    positions: int
    max_length: int
    vocabulary: int


@dataclass(slots=True)
class Row:
    """One row of a forward pass, and the requests (indices) that it answers."""

    ids: tuple[int, ...]
    """With a place holder for every virtual token."""
    budget: int
    """Most new tokens; 0 for a log-likelihood."""
    control: str | None = None
    """Whose vectors stand in the place of ``ids`` from ``control_at`` on."""
    control_at: int = 0
    scored: int = 0
    """Positions, counted from the end, whose logits are needed."""
    members: list[int] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Tokens that the row comes to (prompt and answer)."""
        return len(self.ids) + self.budget


def no_virtual_tokens(request: Request) -> int:
    """How many vectors stand for a request's control, where none does."""
    return 0


def plan(
    requests: Sequence[Request], limits: Limits, virtual: Callable[[Request], int] = no_virtual_tokens
) -> list[list[Row]]:
    """Cut requests into batches of rows; a function of its arguments alone.

    Requests are grouped by kind, decoding, adapter and room for new tokens (groups in order of appearance), sorted
    longest first within a group (ties by index), and cut at ``limits``. Requests that need the same forward pass share
    one row: log-likelihoods with equal ``prompt_ids + continuation_ids[:-1]`` (the choices of a multiple-choice item)
    and identical greedy generations; under one control, as far as there is one. Rows of several controls, and of none,
    share batches. Planning one batch of a plan again yields that batch, in the same order.

    Args:
        requests: the whole list.
        limits: of a batch and of the model.
        virtual: how many vectors stand for a request's control.
    """
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], Row]] = {}
    for index, request in enumerate(requests):
        count, at = virtual(request), request.control_at or 0
        refused = refusal(request, limits, count) is not None
        budget, ids = 0, request.prompt_ids
        soft = (request.control, at) if count else (None, 0)
        ids = ids[:at] + (0,) * count + ids[at:]
        if request.kind == "generate":
            decoding = request.decoding or Decoding()
            budget = min(decoding.max_new_tokens, limits.max_length - len(ids))
            shared = ("row",) if decoding.greedy else (index,)  # samples of one prompt are drawn independently
            group: tuple[Any, ...] = ("generate", decoding, request.adapter, budget)
        else:
            ids = ids + request.continuation_ids[:-1]
            shared, group = ("row",), ("loglikelihood", request.adapter)
        if refused:
            group, budget = ("refused",), 0
        row = groups.setdefault(group, {}).setdefault((ids, *soft, *shared), Row(ids, budget, *soft))
        row.scored = max(row.scored, len(request.continuation_ids))
        row.members.append(index)
    return [batch for rows in groups.values() for batch in _cut(rows.values(), limits)]


def _cut(rows: Iterable[Row], limits: Limits) -> Iterator[list[Row]]:
    batch: list[Row] = []
    positions = 0
    for row in sorted(rows, key=lambda row: -row.width):
        if batch and (
            len(batch) >= limits.rows
            or (len(batch) + 1) * batch[0].width > limits.tokens
            or positions + row.scored > limits.positions
        ):
            yield batch
            batch, positions = [], 0
        batch.append(row)
        positions += row.scored
    if batch:
        yield batch


def refusal(request: Request, limits: Limits, virtual: int = 0) -> str | None:
    """Why this request cannot be answered at all, or None; ``virtual``: vectors that stand for its control."""
    if not request.prompt_ids:
        return "the prompt has no tokens (not even BOS): there is nothing to predict from"
    largest = max(max(request.prompt_ids), max(request.continuation_ids, default=0))
    if largest >= limits.vocabulary:  # on CUDA such an index ends the process, and every answer in flight with it
        return f"token id {largest} is not among the model's {limits.vocabulary}: is the tokenizer of another model?"
    if request.control_at is not None and not 0 <= request.control_at <= len(request.prompt_ids):
        return f"its control stands at {request.control_at} of {len(request.prompt_ids)} tokens"
    length, max_length = len(request.prompt_ids) + virtual, limits.max_length
    if request.kind == "loglikelihood":
        if not request.continuation_ids:
            return "the continuation has no tokens"
        length += len(request.continuation_ids) - 1
        return f"{length} tokens do not fit the context of {max_length}" if length > max_length else None
    return (
        f"a prompt of {length} tokens leaves no room in the context of {max_length}" if length >= max_length else None
    )


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """``text`` up to the first occurrence of any stop string (without it), and whether there was one."""
    found = [at for at in (text.find(stop) for stop in stops if stop) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


class Finite:
    """A logits processor of transformers: a row whose logits are not finite has no next token, and ends.

    ``-inf`` at some tokens is a mask, and allowed. Nothing is read back from the device until :attr:`first` is asked.
    """

    def __init__(self, start: int, end: int) -> None:
        self._start, self._end = start, end
        self._first_B: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits [rows, vocabulary]; a row that is not finite becomes one that gives the end token alone."""
        import torch

        bad_B = ~scores.amax(-1).isfinite()
        now_B = torch.where(bad_B, input_ids.shape[1] - self._start, sys.maxsize)
        self._first_B = now_B if self._first_B is None else torch.minimum(self._first_B, now_B)
        end_V = torch.full_like(scores[0], -torch.inf)
        end_V[self._end] = 0.0
        return torch.where(bad_B[:, None], end_V, scores)

    @property
    def first(self) -> list[int]:
        """For each row the new token (from 0) whose logits were not finite first; a huge number: none."""
        return [] if self._first_B is None else [int(step) for step in self._first_B.tolist()]


class Pace:
    """A stopping criterion of transformers that stops nothing: it tells how far a batch has got, in requests.

    A row's share of the work is taken to be its share of the token budget, so that the last requests are told of at
    the end.
    """

    def __init__(self, tell: Callable[[int], None], requests: int, budget: int) -> None:
        self._tell, self._requests, self._budget = tell, requests, budget
        self._steps = self._told = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Bool [rows], all False."""
        self._steps += 1
        reached = self._requests * self._steps // self._budget
        if reached > self._told:
            self._tell(reached - self._told)
            self._told = reached
        return input_ids.new_zeros(input_ids.shape[0]).bool()


class StopText:
    """A stopping criterion of transformers: a row ends when its newly generated text holds a stop string.

    Only a window of the newest tokens is decoded, and only when the newest token can have completed a stop string,
    that is when its text holds the last character of one (each token's text is looked up once).
    ``ended`` maps a row to the number of new tokens it had then.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int, invisible: frozenset[int]) -> None:
        self.ended: dict[int, int] = {}
        self._tokenizer, self._stops, self._start, self._invisible = tokenizer, stops, start, invisible
        # A token adds at least one byte of text, unless it is invisible; the slack is for a decoder that looks back.
        self._window = max(len(stop.encode()) for stop in stops) + 4
        self._last = {stop[-1] for stop in stops}
        self._may_complete: dict[int, bool] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Bool [rows]: which rows have ended. ``input_ids`` is [rows, prompt + new tokens]."""
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if row not in self.ended and self._candidate(token) and self._holds_stop(input_ids[row]):
                self.ended[row] = input_ids.shape[1] - self._start
        done = input_ids.new_zeros(input_ids.shape[0]).bool()
        done[list(self.ended)] = True
        return done

    def _candidate(self, token: int) -> bool:
        known = self._may_complete.get(token)
        if known is None:
            text = "" if token in self._invisible else self._tokenizer.decode([token])
            # Decoders strip a space at the start of a text, and show part of a character as U+FFFD.
            hidden = " " in self._last or ("\ufffd" in text and any(not char.isascii() for char in self._last))
            known = token not in self._invisible and (hidden or any(char in text for char in self._last))
            self._may_complete[token] = known
        return known

    def _holds_stop(self, ids: torch.Tensor) -> bool:
        newest = ids[max(self._start, len(ids) - 2 * self._window) :].tolist()
        visible = [token for token in newest if token not in self._invisible][-self._window :]
        return cut_at_stop(self._tokenizer.decode(visible, skip_special_tokens=True), self._stops)[1]
