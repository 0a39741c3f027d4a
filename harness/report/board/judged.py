"""Which judges, in which wordings, a task was to be scored by, and where their numbers are or why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.core.text import visible

Of = tuple[str, tuple[str | None, ...], str]
"""Digest of how a column was asked and scored, the templates that it was asked in, and the metric."""
Name = tuple[str, str | None]
"""A judge and a wording."""


@dataclass
class Panel:
    """The judges and wordings of one task, asked in one way, in the order in which it names them."""

    task: str
    scorer: str
    columns: dict[Name, set[str]] = field(default_factory=dict)
    """Digests of how their scores were asked and scored."""
    missing: dict[tuple[Name, str], str] = field(default_factory=dict)
    """Member and key of an arm -> why it has no numbers."""


def label_of(name: Name) -> str:
    """A member of a panel in one line."""
    judge, wording = name
    return visible(judge if wording is None else f"{judge}, {wording}")


def judged_of(info: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Scorer -> who is asked in which step, of a task that names several judges or wordings."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in info.get("judged") or ():
        found.setdefault(str(one["scorer"]), []).append(one)
    return {scorer: some for scorer, some in found.items() if len(some) > 1}
