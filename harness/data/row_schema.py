"""What rows of each schema hold, with an example of each, and the one form in which the rest of the harness sees them.

A prompt is text, which is one user turn, or a list of messages with ``role`` and ``content`` that ends before the
assistant's answer. An answer is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.contracts.dataset import DatasetRow, RowSchema
from harness.core.errors import UserError

FIELDS: dict[str, tuple[str, ...]] = {
    "prompts": (),
    "demonstrations": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"),
    "rated": ("prompt", "completion", "rating"),
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
    # For training on answers that have a number each; a greater one is better.
    "rated": {"prompt": "Name a colour.", "completion": "Red.", "rating": 1.0},
}
"""One row of each schema (``DatasetRow.data``)."""


def row_problem(schema: str, data: Mapping[str, Any]) -> str | None:
    """Why data cannot be a row of this schema; None where they can."""
    for name in FIELDS[schema]:
        value = data.get(name)
        if value is None:
            return f"there is no {name!r}"
        if name == "prompt":
            if not isinstance(value, str) and not _is_conversation(value):
                return f"{name!r} is neither text nor a list of messages with role and content: {value!r:.80}"
        elif name == "rating":
            if not isinstance(value, int | float):
                return f"{name!r} is no number: {value!r:.80}"
        elif not isinstance(value, str):
            return f"{name!r} is no text: {value!r:.80}"
    return None


def _is_conversation(value: Any) -> bool:
    keys = ("role", "content")
    return isinstance(value, list | tuple) and all(
        isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in keys) for message in value
    )


def settled(row: DatasetRow, schema: RowSchema, where: str) -> DatasetRow:
    """The row with its prompt as messages.

    Raises:
        UserError: it does not follow the schema; ``str`` of a list of messages would be trained on as if it were text.
    """
    if problem := row_problem(schema, row.data):
        raise UserError(
            where,
            f"row {row.id} is none of {schema!r}: {problem}",
            "Mend the data set: `harness.testing.check_dataset` finds such.",
        )
    prompt = row.data.get("prompt")
    if schema == "prompts" or not isinstance(prompt, str):
        return row
    return DatasetRow(row.id, {**row.data, "prompt": [{"role": "user", "content": prompt}]})
