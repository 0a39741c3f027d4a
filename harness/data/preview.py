"""What ``harness data`` prints: data sets, counts, and rows as training sees them, with ids and the loss mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts.dataset import Dataset
from harness.contracts.registry import Registry
from harness.core.errors import UserError
from harness.core.specs import ModelSpec
from harness.core.text import visible
from harness.data.selection import Selection, select
from harness.data.tokenise import LossOn, Tokenised, Tokeniser
from harness.models.chat_templates import ChatTemplate, resolve_template

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

LOSS, NO_LOSS = "bold green", "dim"
CHECKED = 500
"""Rows that are tokenised to count rejected ones, unless more are shown (rows)."""


@dataclass(frozen=True)
class Shown:
    """Everything that ``harness data show`` is about."""

    selection: Selection
    template: ChatTemplate
    tokenised: Tokenised
    tokenizer: PreTrainedTokenizerBase
    checked: int
    """How many rows of the order were tokenised."""


def dataset_list(registry: Registry) -> list[dict[str, Any]]:
    """Name, subsets, schema, licence, source and revision of every data set."""
    rows = []
    for name, dataset in registry.of_kind(Dataset):
        schema = dataset.schema if isinstance(dataset.schema, str) else dataset.schema.__name__
        rows.append(
            {
                "name": name,
                "subsets": list(dataset.subsets),
                "schema": "by its columns" if type(dataset).schema_of is not Dataset.schema_of else schema,
                "licence": dataset.licence,
                "source": dataset.source,
                "revision": dataset.revision,
                "summary": dataset.summary,
            }
        )
    return rows


def look(
    expression: str,
    model: str,
    *,
    registry: Registry,
    template: str | None = None,
    rows: int = 3,
    seed: int = 0,
    max_length: int = 1024,
    options: Mapping[str, Any] | None = None,
) -> Shown:
    """Select, and tokenise the first rows of the order as an aligner would.

    Args:
        expression: what ``--dataset`` takes.
        model: folder or hub id: whose tokenizer and template.
        registry: where data sets are looked up.
        template: as ``--template``; the model's own when absent.
        rows: how many will be shown.
        seed: of the order.
        max_length: most tokens of prompt and answer together; never more than the model's context.
        options: ``schema`` (of the aligner; the data set's own when absent), ``loss_on``, and ``data``: data set ->
            its Config.
    """
    from harness.models.inspect import inspect_model, open_tokenizer

    if rows < 1:
        raise UserError("--samples", f"{rows} is no positive number", "Give 1 or more.")
    given = dict(options or {})
    info = inspect_model(ModelSpec(model=model))
    chosen = resolve_template(info, template)
    schema, loss_on = given.get("schema"), given.get("loss_on", "last")
    selection = select(expression, schema=schema, registry=registry, seed=seed, options=given.get("data"))
    tokenizer = open_tokenizer(info)
    first = selection.train[: max(rows, CHECKED)]
    length = min(max_length, info.max_length)
    tokeniser = Tokeniser(tokenizer, chosen, max_length=length, schema=selection.schema, loss_on=loss_on)
    tokeniser.keep(first)
    return Shown(selection, chosen, tokeniser.finish(), tokenizer, len(first))


LOSS_ON: tuple[LossOn, ...] = ("last", "all_answers", "everything")


def summary(shown: Shown) -> list[RenderableType]:
    """Counts of rows and of every drop with its reason, and notes (both readings of a rule among them)."""
    from rich.table import Table
    from rich.text import Text

    selection, tokenised = shown.selection, shown.tokenised
    counts = Table("part", "count", "rows", title="Rows", title_justify="left")
    counts.columns[2].justify = "right"
    for part, numbers in selection.counts.items():
        for index, (what, number) in enumerate(numbers.items()):
            counts.add_row(Text(visible(part) if index == 0 else ""), Text(what), f"{number:,}")
    drops = Table("left out of", "reason", "rows", title="Left out", title_justify="left")
    drops.columns[2].justify = "right"
    for where, reasons in (
        ("training rows", selection.dropped),
        ("held-out rows", selection.heldout_dropped),
        (f"first {shown.checked:,}, tokenised", tokenised.rejected),
    ):
        for reason, number in sorted(reasons.items()):
            drops.add_row(Text(where), Text(visible(reason)), f"{number:,}")
    facts = ", ".join(f"{what} {number:,}" for what, number in tokenised.stats.items())
    lines = [
        f"template: {shown.template.name} {shown.template.digest[:12]}",
        f"first {shown.checked:,} rows, tokenised: {facts}",
        *([shown.template.note] if shown.template.note else []),
        *selection.notes,
        *tokenised.notes,
    ]
    parts: list[RenderableType] = [counts, drops] if drops.row_count else [counts, Text("No row was left out.")]
    return [*parts, *(Text(visible(line)) for line in lines)]


def samples(shown: Shown, count: int, *, mask: bool = False) -> Iterator[RenderableType]:
    """The first rows: rendered text, then token ids; with ``mask`` coloured by whether a token carries loss.

    Tokens with loss also stand between « and », for a terminal without colours and for pipes.
    """
    from rich.text import Text

    for row in shown.tokenised.rows[:count]:
        yield Text(visible(str(row["id"])), style="bold")
        for name, ids, loss in _sequences(row):
            yield Text(f"{name}, {len(ids):,} tokens, {sum(loss):,} with loss", style="cyan")
            yield _pieces(shown.tokenizer, ids, loss if mask else None)
            yield _ids(ids, loss if mask else None)
        yield Text("")


def _sequences(row: Mapping[str, Any]) -> Iterator[tuple[str, list[int], list[int]]]:
    """Name, ids and loss (0 or 1) of each sequence that a row trains on."""
    prompt = row["prompt_ids"]
    if "chosen_ids" in row:
        for name in ("chosen", "rejected"):
            answer = row[f"{name}_ids"]
            yield f"prompt + {name}", prompt + answer, [0] * len(prompt) + [1] * len(answer)
    else:
        ratings = ", ".join(f"{name} {value}" for name, value in row.get("ratings", {}).items())
        yield (
            f"prompt + completion{f' ({ratings})' if ratings else ''}",
            prompt + row["completion_ids"],
            row["labels_mask"],
        )


def _runs(loss: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    start = 0
    for index in range(1, len(loss) + 1):
        if index == len(loss) or loss[index] != loss[start]:
            yield start, index, bool(loss[start])
            start = index


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], loss: list[int] | None) -> Text:
    """Text of the tokens, special ones included; whatever could steer a terminal is made visible."""
    from rich.text import Text

    if loss is None:
        return Text(visible(str(tokenizer.decode(ids, skip_special_tokens=False)), lines=True))
    text = Text()
    for start, end, carries in _runs(loss):
        piece = visible(str(tokenizer.decode(ids[start:end], skip_special_tokens=False)), lines=True)
        text.append(f"«{piece}»" if carries else piece, style=LOSS if carries else NO_LOSS)
    return text


def _ids(ids: list[int], loss: list[int] | None) -> Text:
    from rich.text import Text

    if loss is None:
        return Text(" ".join(map(str, ids)), style=NO_LOSS)
    text = Text()
    for start, end, carries in _runs(loss):
        piece = " ".join(map(str, ids[start:end]))
        text.append((f"«{piece}»" if carries else piece) + " ", style=LOSS if carries else NO_LOSS)
    text.rstrip()
    return text
