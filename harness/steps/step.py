"""A step as plain data: what it is, what it builds on, and the id that names it. Knows no kind of step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.core.records import StepInfo, digest_of
from harness.steps.provenance import NUMERICS


@dataclass(frozen=True)
class Step:
    """One unit of identity, storage and failure. All of it is JSON; live objects are made from it where it runs."""

    kind: str
    id: str
    arm: str
    whole: Mapping[str, Any]
    """All that can move a number: what the id is the digest of."""
    factors: Mapping[str, Any] = field(default_factory=dict)
    """What sets its arm apart: method, data, base, seed."""
    parents: tuple[str, ...] = ()
    """Ids of the steps that it needs ended."""
    made_from: Mapping[str, str] = field(default_factory=dict)
    """Part (base, from, input 1) -> digest of what it is made from; held against the record of an ended step."""

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The same as step.json has it: contents by digest, no path; a plan of thousands of steps needs few of them."""
        cut: Mapping[str, Any] = without_paths(self.whole)
        return cut

    def info(self, folder: Path) -> StepInfo:
        """Return what observers are told."""
        return StepInfo(id=self.id, kind=self.kind, arm=self.arm, factors=dict(self.factors), folder=str(folder))


def make_step(
    kind: str,
    identity: Mapping[str, Any],
    *,
    arm: str,
    factors: Mapping[str, Any] | None = None,
    parents: tuple[str, ...] = (),
    made_from: Mapping[str, str] | None = None,
) -> Step:
    """Give a step its id: the digest of its kind, its identity, and the ``NUMERICS`` of the core.

    Args:
        kind: of step.
        identity: all that can move a number and nothing else; absolute paths in it are part of the id, and are cut to
            their last part in what is kept.
        arm: short name.
        factors: what sets the arm apart.
        parents: ids of the steps that it needs ended.
        made_from: part -> digest of what it is made from.
    """
    whole = {"kind": kind, **identity, "numerics": NUMERICS}
    return Step(kind, digest_of(whole), arm, whole, dict(factors or {}), parents, dict(made_from or {}))


def without_paths(value: Any) -> Any:
    """The same data with absolute paths cut to their last part, so that a record can be moved or published."""
    if isinstance(value, Mapping):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value and len(value) > 1:
        return value.rstrip("/").rsplit("/", 1)[-1]
    return value


def unequal(before: Any, now: Any, path: str = "") -> list[str]:
    """Keys in which two records differ, with both values where they are short: what a message says has changed."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        inner = ((key, f"{path}.{key}" if path else key) for key in sorted(set(before) | set(now)))
        return [found for key, where in inner for found in unequal(before.get(key), now.get(key), where)]
    return [] if _plain(before) == _plain(now) else [f"{path} was {_short(before)}, is {_short(now)}"]


def differences_told(before: Any, now: Any, most: int = 6) -> str:
    """What two records differ in, in one line; what can be read is said before digests."""
    found = sorted(unequal(before, now), key=len)
    return "; ".join(found[:most]) + (f"; and {len(found) - most} more" if len(found) > most else "")


def _plain(value: Any) -> Any:
    """A tuple and the list that JSON makes of it are the same."""
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
