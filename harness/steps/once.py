"""What one plan asks again and again is found once: ten thousand steps have a handful of bases and data sets."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel

P = ParamSpec("P")
R = TypeVar("R")


class Once:
    """Results of functions by their arguments while a plan is made; files are taken not to change meanwhile."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}
        self._kept: list[Any] = []

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function, unless it was called with these arguments before."""
        key = (function, *map(self._key, args), *((name, self._key(value)) for name, value in kwargs.items()))
        if key not in self._found:
            self._found[key] = function(*args, **kwargs)
        found: R = self._found[key]
        return found

    def _key(self, value: Any) -> Hashable:
        if isinstance(value, BaseModel):
            return type(value), value.model_dump_json()
        if isinstance(value, dict):
            return tuple((name, self._key(inner)) for name, inner in sorted(value.items()))
        if isinstance(value, list | tuple):
            return tuple(map(self._key, value))
        if isinstance(value, str | int | float | bool | type(None)):
            return type(value).__name__, value
        # Kept, so that nothing else gets its number.
        self._kept.append(value)
        return id(value)
