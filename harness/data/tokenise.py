"""Rows as token ids: what training sees, made by the functions that make what evaluation sends.

An answered conversation is tokenised whole, and its prompt on its own. Where the prompt's ids are not a prefix of the
whole one's, generation would never meet what training saw, and the row is rejected with a count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from harness.contracts.dataset import ANSWERS, DatasetRow, TrainingRow
from harness.core.errors import UserError
from harness.data.row_schema import Schema, columns_of, form_of, rendered
from harness.models.chat_templates import ChatTemplate
from harness.models.prompts import check_bos, encode_rendered, render_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["last", "all_answers", "everything"]
_CHUNK = 2048
"""Rows tokenised at once (rows)."""

TOO_LONG = "prompt longer than the context"
NO_PREFIX = "the prompt's tokens change when the answer follows"
SPECIAL = "its text holds a special token of the tokenizer"
REFUSED = "the chat template refuses the conversation"
SAME_CUT = "chosen and rejected are equal once tokenised and cut"


@dataclass
class Tokenised:
    """Rows as token ids, what was rejected and why, and numbers about them."""

    rows: list[dict[str, Any]]
    rejected: dict[str, int] = field(default_factory=dict)
    stats: dict[str, int] = field(default_factory=dict)
    """rows, kept, truncated answers, end-of-sequence added (answers), tokens of prompts and of answers, longest."""
    notes: list[str] = field(default_factory=list)


class _RejectedError(Exception):
    """One row that is left out; its text is the reason."""


def tokenise_pairs(
    rows: Iterable[DatasetRow],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    *,
    max_length: int,
    loss_on: LossOn = "last",
) -> Tokenised:
    """Rows of the schema ``pairs`` as ``id``, ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (lists of int).

    The loss is on the answers alone: the log-probabilities of a shared prompt are the same for both and cancel.

    Args:
        rows: what a selection yields.
        tokenizer: of the model that will be trained.
        template: see :func:`harness.models.chat_templates.resolve_template`.
        max_length: most tokens of prompt and answer together.
        loss_on: ``last`` only.

    Raises:
        UserError: another ``loss_on``; a template that is broken, or writes two BOS; every row is rejected.
    """
    tokeniser = Tokeniser(tokenizer, template, max_length=max_length, schema="pairs", loss_on=loss_on)
    tokeniser.keep(rows)
    return tokeniser.finish()


def tokenise_demonstrations(
    rows: Iterable[DatasetRow],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    *,
    max_length: int,
    loss_on: LossOn = "last",
) -> Tokenised:
    """Rows of the schema ``demonstrations`` as token ids and a loss mask.

    Each has ``id``, ``prompt_ids``, ``completion_ids`` and ``labels_mask``: 1 for each token of prompt and completion
    that carries loss. ``last``: the last answer with its EOS; ``all_answers``: every answer with its EOS;
    ``everything``: every token.

    Args and errors as for :func:`tokenise_pairs`.
    """
    tokeniser = Tokeniser(tokenizer, template, max_length=max_length, schema="demonstrations", loss_on=loss_on)
    tokeniser.keep(rows)
    return tokeniser.finish()


Ids = list[int] | str
"""Token ids, or the reason why there are none."""


def _ids(found: Ids) -> list[int]:
    if isinstance(found, str):
        raise _RejectedError(found)
    return found


def _chunks(rows: Iterable[DatasetRow]) -> Iterator[list[DatasetRow]]:
    stream = iter(rows)
    while chunk := list(islice(stream, _CHUNK)):
        yield chunk


@dataclass(frozen=True)
class _Completion:
    ids: list[int]
    truncated: bool
    eos_added: bool


@dataclass(frozen=True)
class _Kept:
    row: dict[str, Any]
    counts: dict[str, int]
    longest: int


class Tokeniser:
    """Rows as token ids with one tokenizer and template, batch after batch.

    Args:
        tokenizer: of the model that will be trained.
        template: see :func:`harness.models.chat_templates.resolve_template`.
        max_length: most tokens of prompt and answer together.
        schema: of the rows; ``ratings``, and the columns of a class of rows, stay beside the token ids.
        loss_on: see :func:`tokenise_demonstrations`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        *,
        max_length: int,
        schema: Schema,
        loss_on: LossOn = "last",
    ) -> None:
        form = form_of(schema)
        if form == "pairs" and loss_on != "last":
            raise UserError(
                "loss_on",
                f"{loss_on!r} for pairs: chosen and rejected share the prompt, whose log-probabilities cancel",
                "Use `last`; `all_answers` and `everything` are for demonstrations.",
            )
        if loss_on not in ("last", "all_answers", "everything"):
            raise UserError("loss_on", f"{loss_on!r} is unknown", "Known: last, all_answers, everything.")
        if max_length < 2:
            raise UserError("max_length", f"{max_length} tokens hold no prompt and answer", "Give at least 2.")
        if tokenizer.eos_token_id is None:
            raise UserError(
                "tokenizer", "it has no end-of-sequence token: the model could never learn to stop", "Set eos_token."
            )
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.loss_on: LossOn = loss_on
        self.special_ids = set(tokenizer.all_special_ids)
        self.special_texts = [text for text in tokenizer.all_special_tokens if text]
        self.rejected: dict[str, int] = {}
        self._own = schema if isinstance(schema, type) and issubclass(schema, TrainingRow) else None
        self._columns = columns_of(schema)
        self._tokenise = self._pair if form == "pairs" else self._demonstration
        self._keys = ANSWERS[form]
        self._kept: list[_Kept] = []

    def keep(self, rows: Iterable[DatasetRow]) -> set[str]:
        """Tokenise rows; ids of those that can be trained on. The others are counted by reason in ``rejected``."""
        before = len(self._kept)
        for chunk in _chunks(rows):
            self._keep(chunk)
        return {kept.row["id"] for kept in self._kept[before:]}

    def _keep(self, rows: Sequence[DatasetRow]) -> None:
        given = rows
        if self._own is not None:
            rows = [DatasetRow(row.id, rendered(row, self._own)) for row in given]
        prompts = self.prompts(rows)
        answered = [self.answered(rows, key, prompts) for key in self._keys]
        for source, row, prompt, *wholes in zip(given, rows, prompts, *answered, strict=True):
            pairs = zip(self._keys, wholes, strict=True)
            columns = {name: source.data[name] for name in self._columns}
            try:
                answers = [self.completion(row.data[key], prompt, whole) for key, whole in pairs]
                self._take(row, prompt, answers, {**self._tokenise(row, prompt, answers), **columns})
            except _RejectedError as reason:
                self.rejected[str(reason)] = self.rejected.get(str(reason), 0) + 1

    def _pair(self, row: DatasetRow, prompt: Ids, answers: Sequence[_Completion]) -> dict[str, Any]:
        chosen, rejected = (answer.ids for answer in answers)
        if chosen == rejected:
            raise _RejectedError(SAME_CUT)
        return {"chosen_ids": chosen, "rejected_ids": rejected}

    def _demonstration(self, row: DatasetRow, prompt: Ids, answers: Sequence[_Completion]) -> dict[str, Any]:
        (answer,) = answers
        head = [int(self.loss_on == "everything")] * len(_ids(prompt))
        if self.loss_on == "all_answers":
            head = self.earlier_answers(row, _ids(prompt))
        return {"completion_ids": answer.ids, "labels_mask": head + [1] * len(answer.ids)}

    def prompts(self, rows: Sequence[DatasetRow]) -> list[Ids]:
        """Ids up to where the assistant answers: those that evaluation sends."""
        found = self._encode([row.data["prompt"] for row in rows], answered=False)
        return [SPECIAL if self._has_special(row) else ids for row, ids in zip(rows, found, strict=True)]

    def answered(self, rows: Sequence[DatasetRow], key: str, prompts: Sequence[Ids]) -> list[Ids]:
        """Ids of the whole conversations; none for rows whose prompt has none."""
        usable = [index for index, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        answer = [{"role": "assistant", "content": str(row.data[key])} for row in rows]
        found = self._encode([[*rows[i].data["prompt"], answer[i]] for i in usable], answered=True)
        ids: list[Ids] = list(prompts)
        for index, one in zip(usable, found, strict=True):
            ids[index] = one
        return ids

    def completion(self, text: str, prompt: Ids, whole: Ids) -> _Completion:
        """What follows the prompt, up to and with the token that ends the answer, cut to the context."""
        head, ids = _ids(prompt), _ids(whole)
        if len(head) >= self.max_length:
            raise _RejectedError(f"{TOO_LONG} ({self.max_length:,} tokens)")
        if ids[: len(head)] != head:
            raise _RejectedError(NO_PREFIX)
        answer, added = self._ended(ids[len(head) :])
        room = self.max_length - len(head)
        return _Completion(answer[:room], len(answer) > room, added)

    def _ended(self, ids: list[int]) -> tuple[list[int], bool]:
        """The answer up to its last special token, which ends it; with EOS added where the template writes none.

        A template may end a turn with another token than EOS (``<|im_end|>``), and write a line feed after it, which no
        engine ever generates.
        """
        last = next((i for i in reversed(range(len(ids))) if ids[i] in self.special_ids), None)
        if last is not None and not str(self.tokenizer.decode(ids[last + 1 :])).strip():
            return ids[: last + 1], False
        return [*ids, int(self.tokenizer.eos_token_id)], True

    def earlier_answers(self, row: DatasetRow, prompt: list[int]) -> list[int]:
        """1 for each token of the prompt that belongs to an answer in it, its end token included."""
        mask = [0] * len(prompt)
        messages = list(row.data["prompt"])
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = _ids(self._encode([messages[:index]], answered=False)[0])
            end = _ids(self._encode([messages[: index + 1]], answered=True)[0])
            if end[: len(start)] != start:
                raise _RejectedError(NO_PREFIX)
            answer, added = self._ended(end[len(start) :])
            upto = len(start) + len(answer) - int(added)
            if prompt[:upto] != [*start, *answer][:upto]:
                raise _RejectedError(NO_PREFIX)
            mask[len(start) : upto] = [1] * (upto - len(start))
        return mask

    def _take(self, row: DatasetRow, prompt: Ids, answers: Sequence[_Completion], fields: Mapping[str, Any]) -> None:
        ids = _ids(prompt)
        check_bos(ids, self.tokenizer, f"chat template {self.template.name}, row {row.id}")
        counts = {
            "truncated answers": sum(answer.truncated for answer in answers),
            "end-of-sequence added": sum(answer.eos_added for answer in answers),
            "prompt tokens": len(ids),
            "answer tokens": sum(len(answer.ids) for answer in answers),
        }
        longest = len(ids) + max(len(answer.ids) for answer in answers)
        self._kept.append(_Kept({"id": row.id, "prompt_ids": ids, **fields}, counts, longest))

    def finish(self, ids: Sequence[str] | None = None) -> Tokenised:
        """The kept rows, or those of them that ``ids`` names, in that order; totals, and what a reader should know.

        Raises:
            UserError: there is none.
        """
        by_id = {kept.row["id"]: kept for kept in self._kept}
        chosen = self._kept if ids is None else [by_id[one] for one in ids]
        result = Tokenised([kept.row for kept in chosen], dict(self.rejected))
        result.stats = {"rows": len(chosen) + sum(self.rejected.values()), "kept": len(chosen)}
        if not chosen:
            reasons = "; ".join(f"{reason}: {count:,}" for reason, count in sorted(self.rejected.items()))
            raise UserError(
                f"chat template {self.template.name}, max_length {self.max_length}",
                f"no row is left once tokenised: {reasons or 'there were none'}",
                "Give another --template or a greater max_length, or choose other data.",
            )
        for what in chosen[0].counts:
            result.stats[what] = sum(kept.counts[what] for kept in chosen)
        result.stats["longest"] = max(kept.longest for kept in chosen)
        if added := result.stats.get("end-of-sequence added"):
            result.notes.append(
                f"chat template {self.template.name} writes no end-of-sequence token after an answer: it was added to "
                f"{added:,} answers, so that the model learns to stop"
            )
        bos = self.tokenizer.bos_token_id
        if bos is not None and result.rows[0]["prompt_ids"][0] != bos and self.tokenizer("").input_ids[:1] == [bos]:
            result.notes.append(
                f"chat template {self.template.name} writes no BOS, which the tokenizer adds to raw text: prompts have "
                "none, in training and evaluation alike"
            )
        return result

    def _has_special(self, row: DatasetRow) -> bool:
        texts = [message["content"] for message in row.data["prompt"]]
        texts += [row.data[key] for key in ("chosen", "rejected", "completion") if key in row.data]
        return any(special in text for special in self.special_texts for text in texts)

    def _encode(self, conversations: Sequence[Sequence[Mapping[str, str]]], *, answered: bool) -> list[Ids]:
        import jinja2

        source = self.template.source
        try:
            texts = render_chats(self.tokenizer, conversations, template=source, answered=answered)
            return list(encode_rendered(self.tokenizer, texts))
        except jinja2.TemplateSyntaxError as error:
            raise self.template.refusal(error) from None
        except jinja2.TemplateError as error:
            if len(conversations) == 1:
                return [f"{REFUSED}: {error}"]
        # Some conversation is refused: find out which.
        return [ids for one in conversations for ids in self._encode([one], answered=answered)]
