"""Which value a rated row was given, by preference, and the names by which values are exported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from harness import Recipe, UserError

Preferences = Mapping[str, Sequence[str]]


def _one_preference() -> dict[str, tuple[str, ...]]:
    return {"preference": ("good", "bad")}


class AnswerRecipe(Recipe):
    """Defaults of SFT in arXiv 2406.04879, Table 6."""

    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate (no unit)")
    max_grad_norm: float = Field(0.3, gt=0, description="gradient norm above which gradients are scaled down")
    weight_decay: float = Field(0.001, ge=0, description="AdamW's weight decay")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="learning-rate schedule")


class ConditionedRecipe(AnswerRecipe):
    """A recipe with what ratings mean."""

    preferences: dict[str, tuple[str, ...]] = Field(
        default_factory=_one_preference,
        min_length=1,
        description="preference of the ratings -> its values, the default first; a rating is a label among them, or a "
        "number, which is the first of two values from `threshold` on, and else the second",
    )
    threshold: float = Field(0.5, allow_inf_nan=False, description="least rating of the first value (unit of ratings)")
    position: Literal["after_bos", "before_answer"] = Field(
        "after_bos", description="where text and virtual tokens stand: behind BOS, or where the answer begins"
    )

    @field_validator("preferences")
    @classmethod
    def _by_name(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """By name, as a conditioning has them: training puts them in the order in which evaluation does."""
        return dict(sorted(value.items()))

    @model_validator(mode="after")
    def _several(self) -> ConditionedRecipe:
        for name, values in self.preferences.items():
            if len(set(values)) != len(values) or len(values) < 2:
                raise ValueError(f"preference {name!r} needs two or more different values, and has {list(values)}")
        return self


def value_keys(preferences: Preferences) -> list[str]:
    """Names of all values as a conditioning has them: ``PREFERENCE=VALUE`` where there are several preferences."""
    if len(preferences) == 1:
        return list(next(iter(preferences.values())))
    return [f"{name}={value}" for name, values in preferences.items() for value in values]


def default_control(preferences: Preferences) -> str:
    """The first value of each preference."""
    if len(preferences) == 1:
        return value_keys(preferences)[0]
    return ",".join(f"{name}={values[0]}" for name, values in preferences.items())


def exported_preferences(preferences: Preferences) -> Preferences | None:
    """What a conditioning says of preferences: nothing where there is one."""
    return preferences if len(preferences) > 1 else None


def values_of(row: Mapping[str, Any], preferences: Preferences, threshold: float) -> list[int]:
    """The value of a row in each preference, as a place in :func:`value_keys`.

    Raises:
        UserError: no rating, or one that is neither a number nor one of the labels.
    """
    found, first = [], 0
    # A table has every preference of any row as a column, and None where a row was not rated for it.
    ratings = {key: one for key, one in (row.get("ratings") or {}).items() if one is not None}
    for name, values in preferences.items():
        where = f"row {row['id']}"
        rating = ratings.get(name)
        if rating is None:
            seen = ", ".join(ratings) or "nothing"
            fix = "Name preferences that all rows are rated for, with --set preferences, or choose rated rows."
            raise UserError(where, f"is not rated for {name!r}; it is rated for: {seen}", fix)
        if isinstance(rating, str):
            if rating not in values:
                fix = "Name all labels of the rows with --set preferences."
                raise UserError(where, f"its {name!r} is {rating!r}, and trained are: {', '.join(values)}", fix)
            place = values.index(rating)
        elif not math.isfinite(rating):
            raise UserError(where, f"its {name!r} is {rating}", "Mend the ratings of the data set.")
        elif len(values) != 2:
            what = f"its {name!r} is the number {rating:g}, and there are {len(values)} values: {', '.join(values)}"
            raise UserError(where, what, "Numbers tell two values apart: rate with labels, or name two values.")
        else:
            place = int(rating < threshold)
        found.append(first + place)
        first += len(values)
    return found


def check_spread(values: Sequence[Sequence[int]], preferences: Preferences, method: str) -> None:
    """Refuse rows among which a value never occurs: nothing would be learned of what tells it from the others.

    Raises:
        UserError: names the value, and how many rows have which.
    """
    counts = Counter(place for row in values for place in row)
    keys = value_keys(preferences)
    absent = [key for place, key in enumerate(keys) if not counts[place]]
    if absent:
        seen = ", ".join(f"{counts[place]:,} {key}" for place, key in enumerate(keys))
        fix = "Take rows of every value: pairs have both, and --set threshold=N moves where numbers part."
        raise UserError(f"{method}: rows", f"none is {absent[0]!r} ({seen})", fix)


def other_values(row: Sequence[int], preferences: Preferences) -> list[list[int]]:
    """A row's values with those of one preference replaced: by preference, then by its other values in turn."""
    found, first = [], 0
    for number, values in enumerate(preferences.values()):
        for step in range(1, len(values)):
            other = first + (row[number] - first + step) % len(values)
            found.append([*row[:number], other, *row[number + 1 :]])
        first += len(values)
    return found
