"""What conditions the prompts of a trained model: named values, of which one is chosen. Data, never code.

A value is a text, a further adapter, or embeddings of virtual tokens. Where several preferences were trained at once, a
value is chosen for each, and what stands for them follows one another in the order of the preferences.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from harness.core.config import Config, parse_options
from harness.core.errors import UserError, nearest

Position = Literal["after_bos", "before_answer"]
ControlKind = Literal["text", "adapter", "embeddings"]
EVERY = "all"
"""In place of a value: every one."""
MOST_CONTROLS = 1_000
"""Combinations of values of several preferences; each would be an arm."""
_KINDS: tuple[ControlKind, ...] = get_args(ControlKind)
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


class ControlValue(Config):
    """What stands for one value: exactly one of a text, an adapter and embeddings."""

    text: str | None = Field(None, min_length=1, description="written into the prompt, tokenised by itself")
    adapter: str | None = Field(
        None, max_length=200, description="folder beside this file with a LoRA adapter of the same base"
    )
    embeddings: str | None = Field(
        None, max_length=200, description="safetensors file beside this file with the virtual tokens"
    )
    tensor: str | None = Field(
        None, description="name of the tensor in that file, of shape (tokens, hidden size); the value's own when absent"
    )

    @property
    def kind(self) -> ControlKind:
        """Which of the three it is."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a value is one of {', '.join(_KINDS)}, and here are {' and '.join(given) or 'none'}")
        if self.tensor is not None and self.embeddings is None:
            raise ValueError("`tensor` names a tensor of `embeddings`")
        return self


class Conditioning(Config):
    """What ``conditioning.json`` says: the values that a model was trained with, and which one stands for none.

    With ``preferences`` the keys of ``values`` are ``PREFERENCE=VALUE``, and a control is one value for each, written
    ``harmless=bad,helpful=good`` in the order of their names.
    """

    values: dict[str, ControlValue] = Field(min_length=1, description="name of a value -> what stands for it")
    default: str = Field(description="the control that is applied where none is asked for")
    position: Position = Field(
        "after_bos",
        description="where text and virtual tokens stand: after_bos (at the start, behind a BOS token where there is"
        " one) or before_answer (at the end of the prompt, where the model goes on)",
    )
    preferences: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="preference -> its values, where several are trained; else empty"
    )

    @model_validator(mode="before")
    @classmethod
    def _in_order(cls, data: Any) -> Any:
        """Preferences in the order of their names, as in the file, whose keys are sorted; the default likewise."""
        if not isinstance(data, Mapping) or not isinstance(data.get("preferences"), Mapping):
            return data
        found = {**data, "preferences": dict(sorted(data["preferences"].items(), key=lambda one: str(one[0])))}
        if found["preferences"] and isinstance(data.get("default"), str):
            found["default"] = ",".join(sorted(data["default"].split(","), key=lambda one: one.partition("=")[0]))
        return found

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in (*self.preferences, *itertools.chain(*self.preferences.values())) or self.values:
            if not _NAME.fullmatch(name) or name == EVERY:
                raise ValueError(f"{name!r} is no name: letters, digits and . _ + -, and not {EVERY!r}")
        wanted = [f"{kind}={value}" for kind, values in self.preferences.items() for value in dict.fromkeys(values)]
        if self.preferences and sorted(wanted) != sorted(self.values):
            odd = sorted(set(wanted) ^ set(self.values))
            raise ValueError(f"`values` and `preferences` do not name the same ({', '.join(odd)})")
        if any(not values for values in self.preferences.values()):
            raise ValueError("a preference without values")
        if math.prod(len(values) for values in self.preferences.values()) > MOST_CONTROLS:
            raise ValueError(f"more than {MOST_CONTROLS} combinations of values")
        if self.preferences and len({value.kind for value in self.values.values()}) > 1:
            raise ValueError("with several preferences all values are of one kind: text, adapter or embeddings")
        if self.default not in self.controls:
            raise ValueError(f"`default` is {self.default!r}, and there are: {', '.join(self.controls)}")
        return self

    @property
    def controls(self) -> tuple[str, ...]:
        """Every control: the values, or every combination of the values of the preferences."""
        if not self.preferences:
            return tuple(self.values)
        kinds = [[f"{kind}={value}" for value in dict.fromkeys(values)] for kind, values in self.preferences.items()]
        return tuple(",".join(parts) for parts in itertools.product(*kinds))

    def parts(self, control: str) -> dict[str, ControlValue]:
        """What stands for a control, in order: key of ``values`` -> value."""
        return {name: self.values[name] for name in control.split(",")}

    def kind(self, control: str) -> ControlKind:
        """What stands for a control: text, adapters or embeddings."""
        return next(iter(self.parts(control).values())).kind

    def resolve(self, asked: str | None, where: str = "--control") -> str:
        """The control that is meant: the default where none is asked for; preferences left out are at their defaults.

        Raises:
            UserError: a value or a preference that was not trained, naming those that were.
        """
        if asked is None:
            return self.default
        if not self.preferences:
            if asked in self.values:
                return asked
            raise self._unknown(where, "value", asked, list(self.values))
        chosen = dict(part.split("=", 1) for part in self.default.split(","))
        for part in (one.strip() for one in asked.split(",")):
            kind, equals, value = part.partition("=")
            if not equals or kind not in self.preferences:
                raise self._unknown(where, "preference", part, [f"{one}=VALUE" for one in self.preferences])
            if value not in self.preferences[kind]:
                raise self._unknown(where, f"value of {kind}", value, list(self.preferences[kind]))
            chosen[kind] = value
        return ",".join(f"{kind}={chosen[kind]}" for kind in self.preferences)

    def expand(self, asked: Sequence[str], where: str = "--control") -> list[str]:
        """The controls that several ``--control`` stand for, each once; ``all`` stands for every one.

        Raises:
            UserError: as :meth:`resolve`.
        """
        found = [self.controls if one == EVERY else (self.resolve(one, where),) for one in asked]
        return list(dict.fromkeys(itertools.chain(*found)))

    def _unknown(self, where: str, what: str, seen: str, known: Sequence[str]) -> UserError:
        close = nearest(seen, known, limit=1)
        guess = f"Did you mean {close[0]!r}? " if close else ""
        return UserError(where, f"no {what} {seen!r} was trained", f"{guess}Trained: {', '.join(known)}; or {EVERY}.")


def promised(preferences: Mapping[str, Sequence[str]]) -> Conditioning:
    """A conditioning by its names alone, before anything stands for its values; the first of each is the default.

    Args:
        preferences: preference -> its values; one preference alone need not be named.

    Raises:
        UserError: names that do not make a conditioning.
    """
    several = len(preferences) > 1
    names = [f"{kind}={one}" if several else one for kind, values in preferences.items() for one in values]
    found: dict[str, Any] = {"values": {name: {"text": name} for name in names}, "default": names[0] if names else ""}
    if several:
        kinds = {kind: list(values) for kind, values in preferences.items()}
        default = ",".join(f"{kind}={next(iter(values), '')}" for kind, values in kinds.items())
        found |= {"preferences": kinds, "default": default}
    return conditioning_of(found, "values of the method")


def control_place(prompt_ids: Sequence[int], position: Position, bos: int | None) -> int:
    """How many of a prompt's tokens stand before its control: training and evaluation both ask here.

    Args:
        prompt_ids: the prompt up to where the answer begins, without a control.
        position: of the conditioning.
        bos: the tokenizer's BOS token; None: it has none.
    """
    if position == "before_answer":
        return len(prompt_ids)
    return 1 if prompt_ids and bos is not None and prompt_ids[0] == bos else 0


def insert_control(
    prompt_ids: Sequence[int], control_ids: Sequence[int], position: Position, bos: int | None
) -> list[int]:
    """The token ids of a prompt with a written control in it; see :func:`control_place`."""
    place = control_place(prompt_ids, position, bos)
    return [*prompt_ids[:place], *control_ids, *prompt_ids[place:]]


def refuse_control(
    asked: Sequence[str], conditioning: Conditioning | None, what: str, where: str = "--control"
) -> None:
    """Refuse a control for what was trained without one.

    Raises:
        UserError: ``what`` has no conditioning, and a control is asked for.
    """
    if asked and conditioning is None:
        raise UserError(where, f"{asked[0]!r} given, but {what}", f"Leave {where.rpartition(', ')[2]} out.")


def conditioning_of(found: Mapping[str, object], where: str) -> Conditioning:
    """A conditioning from the data of its file.

    Raises:
        UserError: naming the key, and what is wrong.
    """
    plain = {key: value for key, value in found.items() if key not in ("schema_version", "checksum")}
    return parse_options(Conditioning, plain, where)
