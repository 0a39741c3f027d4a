"""What rows of each schema hold, with an example of each, and the one form in which the rest of the harness sees them.

A prompt is text, which is one user turn, or a list of messages with ``role`` and ``content`` that ends before the
assistant's answer. An answer is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from harness.contracts.dataset import ANSWERS, DatasetRow, RowSchema, TrainingRow, schema_name
from harness.core.errors import UserError

Schema = RowSchema | type[BaseModel]

FIELDS: dict[str, tuple[str, ...]] = {
    "prompts": (),
    "demonstrations": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"),
    "rated": ("prompt", "completion", "ratings"),
}
"""What the rows of each schema hold at least."""
EXAMPLES: dict[RowSchema, Mapping[str, Any]] = {
    # For evaluation: whatever the task's template, target and scorers name.
    "prompts": {"question": "What is two plus two?", "answer": "four"},
    # For training on good answers.
    "demonstrations": {"prompt": "Name a colour.", "completion": "Red."},
    # For training on preferences; here after a system message and an earlier turn.
    "pairs": {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": "Another?"},
        ],
        "chosen": "Blue.",
        "rejected": "I have named one already, and one should do.",
    },
    # For training on answers that are rated: by preference a number, where a greater one is better, or a label.
    "rated": {"prompt": "Name a colour.", "completion": "Red.", "ratings": {"preference": 1.0, "tone": "curt"}},
}
"""One row of each schema (``DatasetRow.data``)."""
PREFERENCE = "preference"
"""The preference of a rating that names none."""


def form_of(schema: Schema | None) -> str:
    """``pairs`` or ``demonstrations``: which token ids rows of a schema become."""
    if isinstance(schema, type) and issubclass(schema, TrainingRow):
        return schema.form
    return "pairs" if schema == "pairs" else "demonstrations"


def columns_of(schema: Schema) -> tuple[str, ...]:
    """What stands beside the token ids of a row, as the data set gave it."""
    if isinstance(schema, type):
        return schema.columns if issubclass(schema, TrainingRow) else ()
    return ("ratings",) if schema == "rated" else ()


def row_problem(schema: str, data: Mapping[str, Any]) -> str | None:
    """Why data cannot be a row of this schema; None where they can."""
    for name in FIELDS[schema]:
        value = data.get(name)
        if value is None:
            return f"there is no {name!r}"
        if name == "prompt":
            if not isinstance(value, str) and not _is_conversation(value):
                return f"{name!r} is neither text nor a list of messages with role and content: {value!r:.80}"
        elif name == "ratings":
            if not isinstance(value, Mapping) or not value or not all(map(_is_rating, value.items())):
                return f"{name!r} is no mapping from preferences to numbers or labels: {value!r:.80}"
        elif not isinstance(value, str):
            return f"{name!r} is no text: {value!r:.80}"
    return None


def _is_rating(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], int | float | str)


def _is_conversation(value: Any) -> bool:
    keys = ("role", "content")
    return isinstance(value, list | tuple) and all(
        isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in keys) for message in value
    )


def settled(row: DatasetRow, schema: Schema, where: str) -> DatasetRow:
    """The row with its prompt as messages; a row of a class of its own as that class reads it.

    Raises:
        UserError: it does not follow the schema; ``str`` of a list of messages would be trained on as if it were text.
    """
    if isinstance(schema, type):
        try:
            data = schema.model_validate(dict(row.data)).model_dump()
        except ValidationError as error:
            problem: str | None = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        else:
            return DatasetRow(row.id, data)
    else:
        problem = row_problem(schema, row.data)
    if problem is not None:
        raise UserError(
            where,
            f"row {row.id} is none of {schema_name(schema)!r}: {problem}",
            "Mend the data set: `harness.testing.check_dataset` finds such.",
        )
    prompt = row.data.get("prompt")
    if schema == "prompts" or not isinstance(prompt, str):
        return row
    return DatasetRow(row.id, {**row.data, "prompt": [{"role": "user", "content": prompt}]})


def rendered(row: DatasetRow, schema: type[TrainingRow]) -> dict[str, Any]:
    """What of a row of a class of its own is trained on: prompt as messages, answers as text.

    Raises:
        UserError: its ``render`` does not return that.
    """
    found = schema.model_validate(dict(row.data)).render()
    names = ANSWERS[schema.form]
    problem = "it is no mapping" if not isinstance(found, Mapping) else row_problem(schema.form, found)
    if problem is not None:
        what = f"`render` of row {row.id} returned none of {schema.form!r}: {problem}"
        raise UserError(f"rows {schema.__name__}", what, f"Return prompt, {', '.join(names)}.")
    prompt = found["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return {"prompt": messages, **{name: found[name] for name in names}}
