"""A plan's steps by key: each once, after those that it needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

from harness.core.errors import UserError
from harness.steps.step import Step


class Graph:
    """Steps by key, which is their id as far as it is known before what they build on is there.

    A step that is added twice is one: two arms that are asked the same, or start from the same, share it.
    """

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        self.steps: dict[str, Step] = {}
        for step in steps:
            self.add(step)

    def add(self, step: Step) -> Step:
        """Return the step of this key, which is the one that was first added."""
        return self.steps.setdefault(step.id, step)

    def __iter__(self) -> Iterator[Step]:
        """Give the steps, each after its parents.

        Raises:
            UserError: steps that wait for each other, or for one that is not there.
        """
        sorter = TopologicalSorter({key: step.parents for key, step in self.steps.items()})
        try:
            order = list(sorter.static_order())
        except CycleError as error:
            names = " -> ".join(self.steps[key].arm for key in error.args[1])
            raise UserError(
                "the plan", f"steps wait for each other: {names}", "Take one of these needs away."
            ) from None
        return (self.steps[key] for key in order)

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self.steps)

    def counts(self) -> dict[str, int]:
        """How many steps there are of each kind, in the order in which kinds first come."""
        return dict(Counter(step.kind for step in self))

    def ready(self, ended: Collection[str]) -> list[Step]:
        """Steps that have not ended and whose parents have; ``ended`` are keys."""
        return [step for step in self if step.id not in ended and all(key in ended for key in step.parents)]

    def depending_on(self, key: str) -> list[Step]:
        """Steps that cannot be done without this one, directly or not."""
        found = {key}
        for step in self:
            if found.intersection(step.parents):
                found.add(step.id)
        return [self.steps[one] for one in self.steps if one in found - {key}]
