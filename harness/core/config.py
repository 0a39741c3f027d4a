"""Typed configuration whose errors carry the file, the line and the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from yaml import MappingNode, Node, SequenceNode, YAMLError

from harness.core.errors import UserError, nearest
from harness.core.plain_yaml import NotPlain, document_of, read_yaml

KeyPath = tuple[str | int, ...]


class Config(BaseModel):
    """Base of every configuration: frozen, extra fields forbidden, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`learning_rate: yes` is not 1.0, as pydantic would have it."""
        field = cls.model_fields.get(info.field_name or "")
        kinds = {field.annotation, *getattr(field.annotation, "__args__", ())} if field is not None else set()
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("expected a number")
        return value


C = TypeVar("C", bound=BaseModel)


class Located:
    """YAML data that remembers on which line each key stands."""

    def __init__(self, data: Any, source: str, lines: Mapping[KeyPath, int]) -> None:
        self.data, self.source, self._lines = data, source, dict(lines)

    def has(self, path: Sequence[str | int]) -> bool:
        """Whether the file has such a key."""
        return tuple(path) in self._lines

    def where(self, path: Sequence[str | int]) -> str:
        """``file:line, key`` of a key, or of its nearest parent that is in the file."""
        key = tuple(path)
        dotted = ".".join(str(part) for part in key)
        while key and key not in self._lines:
            key = key[:-1]
        line = self._lines.get(key)
        place = f"{self.source}:{line}" if line is not None else self.source
        return f"{place}, {dotted}" if dotted else place


def load_yaml(path: Path, text: str | None = None) -> Located:
    """Read one YAML document of plain data; ``text``: what the file would hold, in place of what it holds.

    Raises:
        UserError: no readable file; no YAML, or more than plain data of a bounded size.
    """
    text = text_of(path) if text is None else text
    try:
        node, data = document_of(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(place, f"not valid YAML: {problem}", "Mend the syntax at that line.") from None
    lines: dict[KeyPath, int] = {}
    if node is not None:
        _collect_lines(node, (), lines, path)
    return Located(data, str(path), lines)


def text_of(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        UserError: no regular file, or none that can be read.
    """
    fix = "Give the path of a readable UTF-8 YAML file."
    try:
        # Reading a pipe waits for its other end, and some devices never end.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(str(path), "is no regular file", fix)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read: {error}", fix) from None


def _collect_lines(node: Node, path: KeyPath, lines: dict[KeyPath, int], file: Path) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, MappingNode):
        for key, value in node.value:
            child = (*path, key.value)
            line = key.start_mark.line + 1
            if child in lines:
                # YAML readers keep the last one in silence.
                what = f"key {key.value!r} is given twice (first on line {lines[child]})"
                raise UserError(f"{file}:{line}, {'.'.join(map(str, child))}", what, "Keep one of the two.")
            lines[child] = line
            _collect_lines(value, child, lines, file)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(value, (*path, index), lines, file)


def parse(model: type[C], located: Located) -> C:
    """Validate located data; every problem is reported with its line, the value seen and the remedy.

    Raises:
        UserError: for the first problem, with the count of the others.
    """
    if not isinstance(located.data, dict):
        raise UserError(located.where(()), f"expected a mapping, found {type(located.data).__name__}", _fields(model))
    try:
        return model.model_validate(located.data)
    except ValidationError as error:
        raise _as_user_error(model, error, located) from None


def parse_options(model: type[C], options: Mapping[str, Any], where: str) -> C:
    """As :func:`parse`, for options that come from ``--set`` or from Python."""
    return parse(model, Located(dict(options), where, {}))


def _as_user_error(model: type[BaseModel], error: ValidationError, located: Located) -> UserError:
    problems = error.errors(include_url=False)
    first = problems[0]
    where = located.where(_said(located.data, first["loc"], missing=first["type"] == "missing"))
    rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        owner = _owner(model, first["loc"][:-1])
        close = nearest(key, owner.model_fields)
        fix = f"Did you mean {close[0]!r}? " if close else ""
        return UserError(where, f"unknown key {key!r}{rest}", fix + _fields(owner))
    if first["type"] == "missing":
        return UserError(
            where, f"required key {first['loc'][-1]!r} is missing{rest}", _fields(_owner(model, first["loc"][:-1]))
        )
    seen = "" if isinstance(first["input"], dict | list) else f", found {first['input']!r}"
    message = str(first["msg"]).removeprefix("Value error, ")
    return UserError(where, f"{message}{seen}{rest}", "Give a value of that kind.")


def _said(data: Any, loc: Sequence[int | str], *, missing: bool) -> list[int | str]:
    """The part of ``loc`` that the user wrote: pydantic puts names of its own types between (``constrained-float``)."""
    path: list[int | str] = []
    for part in loc:
        inside = isinstance(data, dict) and part in data
        if inside or (isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)):
            data = data[part]
            path.append(part)
    return [*path, loc[-1]] if missing else path


def _owner(model: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel]:
    """The model class that the key path ``loc`` leads to, as far as it can be followed."""
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        inner = field.annotation
        candidates = [inner, *getattr(inner, "__args__", ())]
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
                break
    return model


def _fields(model: type[BaseModel]) -> str:
    names = ", ".join(model.model_fields)
    return f"Allowed keys: {names}." if names else "It takes no keys."


def set_path(options: dict[str, Any], assignment: str, where: str = "--set") -> None:
    """Apply one ``a.b.c=value`` to nested options; the value is read as YAML (numbers, lists, true, null).

    Raises:
        UserError: when there is no ``=`` or a part of the key is not a mapping.
    """
    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise UserError(where, f"{assignment!r} is not key=value", "Write for example --set real_toxicity.limit=10.")
    try:
        value = read_yaml(text) if text else ""
    except NotPlain as error:
        raise UserError(where, f"{assignment!r}: {error.problem}", "Quote the value if it is meant as text.") from None
    except YAMLError:
        value = text
    parts = key.strip().split(".")
    here = options
    for part in parts[:-1]:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise UserError(where, f"{assignment!r}: {part!r} is a value, not a group", "Set its keys in one place.")
    here[parts[-1]] = value


def laid_over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Nested options, ``top`` winning key by key."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = laid_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
